"""The command line of likelihood: `python eval_ppl.py --model outputs/quickstart [--setting value ...]`.

Nats per token, bits per token and perplexity of plan, execution and both, given the question. They are an upper bound
for every algorithm but `ar` and blocks of one token, for which they are exact. The tokens are the same for all. Of
plain text all is execution: its tokens and an `<|end|>` for each document; and there are bits per byte.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.data.splits import encode_split
from hierbd3lm.diffusion_hierbd3lm import ESTIMATORS
from hierbd3lm.evaluation.checkpoints import CheckpointArguments, load_examples, versions
from hierbd3lm.evaluation.likelihood import format_likelihood, measure_likelihood
from hierbd3lm.evaluation.runner import load_model

LIKELIHOOD_FILE = "likelihood.json"


@dataclass
class LikelihoodArguments(CheckpointArguments):
    """What is measured, and how."""

    text_column: str | None = field(
        default=None, metadata={"help": "Column of plain text in `dataset`; as in training if omitted."}
    )
    num_draws: int = field(default=8, metadata={"help": "Draws of the noise for each example; >= 1."})
    exact: bool = field(
        default=False, metadata={"help": "Enumerates all masks instead, for blocks of at most 8 tokens."}
    )
    estimator: str = field(default="stratified", metadata={"help": "stratified or bernoulli."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    output: str | None = field(default=None, metadata={"help": f"File of the results; {LIKELIHOOD_FILE} in `model`."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("num_draws", self.num_draws, 1)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.output is None:
            self.output = str(Path(self.model, LIKELIHOOD_FILE))


def main() -> None:
    """Parses, measures, writes, prints."""
    args = HfArgumentParser(LikelihoodArguments).parse_args_into_dataclasses(sys.argv[1:])[0]
    result = measure(args)
    write_json(Path(args.output), result)
    print(f"{args.model} ({result['algorithm']}) on {result['dataset']}, {result['split']} ({args.output})")
    print(format_likelihood(result))
    print(format_data(result))


def measure(args: LikelihoodArguments) -> dict[str, Any]:
    """The likelihood with all that it depends on."""
    model, tokenizer = load_model(args.model, args.device)
    data_args, examples = load_examples(args, args.text_column)
    dataset, report = encode_split(examples, replace(data_args, over_long="drop"), tokenizer, model.config)
    if len(dataset) == 0:
        raise ValueError(f"`dataset` must have an example that fits, but all {report['num_dropped']} are over-long")
    settings = {name: getattr(args, name) for name in ("num_draws", "exact", "estimator", "batch_size", "seed")}
    metrics = measure_likelihood(model, dataset, **settings)
    if "num_bytes" in report:
        metrics["bits_per_byte"] = metrics["bpd"] * metrics["num_tokens"] / report["num_bytes"]
    return metrics | {
        "model": args.model,
        "algorithm": model.config.algorithm,
        "dataset": data_args.dataset,
        "dataset_name": data_args.dataset_name,
        "split": getattr(data_args, f"dataset_{args.split}_split", None) or args.split,
        **{name: value for name, value in report.items() if name not in ("num_kept", "num_tokens")},
        **settings,
        "device": str(model.device),
        "versions": versions(),
    }


def format_data(result: dict[str, Any]) -> str:
    """What was measured on, for people."""
    if "num_documents" not in result:
        return f"{result['num_examples']:,} examples, {result['num_dropped']:,} of them over-long and left out"
    size = f"{result['num_documents']:,} documents of {result['num_bytes']:,} bytes on {result['num_rows']:,} rows"
    return f"{size}: {result['bits_per_byte']:.4f} bits per byte"


if __name__ == "__main__":
    main()
