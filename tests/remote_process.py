"""A script of test_remote_code.py: loads a checkpoint where the package is not installed and reports as JSON."""

import argparse
import importlib
import json
import sys


class Uninstalled:
    """Hides the package, however it is installed, as it is on the machine of somebody who only has the checkpoint."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hierbd3lm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def uninstall():
    sys.meta_path.insert(0, Uninstalled)
    try:
        importlib.import_module("hierbd3lm")
    except ModuleNotFoundError:
        return
    raise RuntimeError("the package must not be importable in this process")


def main():
    uninstall()
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="a folder or the name of a repository")
    parser.add_argument("--question", required=True)
    parser.add_argument("--doors", nargs="+", default=["AutoModel", "AutoModelForCausalLM"])
    parser.add_argument("--save_to", help="where to save what the first door has loaded")
    args = parser.parse_args()
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(args.checkpoint, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    inputs = tokenizer(args.question, return_tensors="pt")
    report = {"config": config.to_diff_dict(), "config_module": type(config).__module__, "doors": {}}
    for door in args.doors:
        model = getattr(transformers, door).from_pretrained(args.checkpoint, trust_remote_code=True)
        output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        report["doors"][door] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "sequences": output.sequences.tolist(),
            "texts": tokenizer.batch_decode(output.sequences),
            "generation_class": type(model.generation_config).__name__,
            "generation_module": type(model.generation_config).__module__,
            "generation_config": model.generation_config.to_dict(),
        }
        if args.save_to and door == args.doors[0]:
            model.save_pretrained(args.save_to)
            tokenizer.save_pretrained(args.save_to)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
