"""The command line of likelihood: `python eval_ppl.py --model outputs/quickstart [--setting value ...]`.

Nats per token, bits per token and perplexity of plan, execution and both, given the question. They are an upper bound
for every algorithm but `ar` and blocks of one token, for which they are exact. The tokens are the same for all.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, HfArgumentParser

from hierbd3lm import __version__
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.data.splits import SYNTHETIC, load_split
from hierbd3lm.diffusion_hierbd3lm import ESTIMATORS
from hierbd3lm.eval_gsm8k import NUM_SYNTHETIC, find_data
from hierbd3lm.likelihood import format_likelihood, measure_likelihood
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

LIKELIHOOD_FILE = "likelihood.json"


@dataclass
class LikelihoodArguments:
    """What is measured, and how."""

    model: str = field(metadata={"help": "Folder or id of a checkpoint, with its tokenizer."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`synthetic`, `gsm8k`, a .json or .jsonl file, a folder, or a dataset on the Hub; what the "
            "checkpoint was trained on if omitted."
        },
    )
    split: str = field(
        default="test",
        metadata={
            "help": "train, validation or test; ood_longer and ood_wider too for `synthetic`. A file is `test`."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": f"The first so many examples; if omitted, all, or {NUM_SYNTHETIC} for `synthetic`."},
    )
    num_draws: int = field(default=8, metadata={"help": "Draws of the noise for each example; >= 1."})
    exact: bool = field(
        default=False, metadata={"help": "Enumerates all masks instead, for blocks of at most 8 tokens."}
    )
    estimator: str = field(default="stratified", metadata={"help": "stratified or bernoulli."})
    batch_size: int = field(default=32, metadata={"help": "Examples that are measured together."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    output: str | None = field(default=None, metadata={"help": f"File of the results; {LIKELIHOOD_FILE} in `model`."})
    device: str | None = field(default=None, metadata={"help": "Such as `cpu` or `cuda:0`; a GPU if there is one."})

    def __post_init__(self):
        for name in ("limit", "num_draws", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.output is None:
            self.output = str(Path(self.model, LIKELIHOOD_FILE))
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Parses, measures, writes, prints."""
    args = HfArgumentParser(LikelihoodArguments).parse_args_into_dataclasses(sys.argv[1:])[0]
    result = measure(args)
    write_json(Path(args.output), result)
    print(f"{args.model} ({result['algorithm']}) on {result['dataset']}, {args.split} ({args.output})")
    print(format_likelihood(result))
    print(f"{result['num_examples']:,} examples, {result['num_dropped']:,} of them over-long and left out")


def measure(args: LikelihoodArguments) -> dict[str, Any]:
    """The likelihood with all that it depends on."""
    model = HierBD3LMForBlockDiffusion.from_pretrained(args.model).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, config=model.config)
    data_args = find_data(args)
    limit = NUM_SYNTHETIC if args.limit is None and data_args.dataset == SYNTHETIC else args.limit
    dataset, report = prepare_dataset(
        load_split(data_args, args.split, limit), tokenizer, model.config, auto_split=data_args.auto_split
    )
    if len(dataset) == 0:
        raise ValueError(f"`dataset` must have an example that fits, but all {report['num_dropped']} are over-long")
    settings = {name: getattr(args, name) for name in ("num_draws", "exact", "estimator", "batch_size", "seed")}
    metrics = measure_likelihood(model, dataset, **settings)
    return metrics | {
        "model": args.model,
        "algorithm": model.config.algorithm,
        "dataset": data_args.dataset,
        "split": args.split,
        "num_examples": report["num_examples"],
        "num_dropped": report["num_dropped"],
        "dropped_by_segment": report["dropped_by_segment"],
        **settings,
        "device": str(model.device),
        "versions": {
            "hierbd3lm": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
