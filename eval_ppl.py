"""The command line of likelihood: `python eval_ppl.py --model outputs/quickstart [--setting value ...]`.

Nats per token, bits per token and perplexity of plan, execution and both, given the question. They are an upper bound
for every algorithm but `ar` and blocks of one token, for which they are exact. The tokens are the same for all.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.diffusion_hierbd3lm import ESTIMATORS
from hierbd3lm.evaluation import load_model
from hierbd3lm.evaluation_data import CheckpointArguments, load_examples, versions
from hierbd3lm.likelihood import format_likelihood, measure_likelihood

LIKELIHOOD_FILE = "likelihood.json"


@dataclass
class LikelihoodArguments(CheckpointArguments):
    """What is measured, and how."""

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
    print(f"{args.model} ({result['algorithm']}) on {result['dataset']}, {args.split} ({args.output})")
    print(format_likelihood(result))
    print(f"{result['num_examples']:,} examples, {result['num_dropped']:,} of them over-long and left out")


def measure(args: LikelihoodArguments) -> dict[str, Any]:
    """The likelihood with all that it depends on."""
    model, tokenizer = load_model(args.model, args.device)
    data_args, examples = load_examples(args)
    dataset, report = prepare_dataset(examples, tokenizer, model.config, auto_split=data_args.auto_split)
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
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
