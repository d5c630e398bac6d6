"""The command line of evaluation: `python eval_gsm8k.py --model outputs/quickstart [--setting value ...]`.

On GSM8K two floors help to read a score: the best constant answer is right in 2.7 % of the test problems, and the best
single number of the question in 6.4 %.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hierbd3lm.data.arguments import check_at_least
from hierbd3lm.data.run_folder import write_json
from hierbd3lm.evaluation.checkpoints import CheckpointArguments, load_examples, versions
from hierbd3lm.evaluation.runner import (
    REFERENCE_PLANS,
    SUMMARY_FILE,
    check_samples,
    describe_run,
    format_prediction,
    format_summary,
    load_model,
    predict,
    start_run,
    summarize,
    with_given_plans,
)
from hierbd3lm.generation_hierbd3lm import segment_limits
from hierbd3lm.settings_hierbd3lm import SETTINGS, resolve_settings, settings_of


@dataclass
class EvaluationArguments(CheckpointArguments):
    """What is evaluated, on what, and how it generates. A generation setting that is omitted is the checkpoint's."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results; `eval` in `model`."})
    overwrite: bool = field(default=False, metadata={"help": "Throws away the results that `output_dir` holds."})
    given_plan: str | None = field(
        default=None,
        metadata={
            "help": "Plans that the execution is generated from: `reference`, or a .jsonl file of `question` and "
            "`plan`, such as the predictions.jsonl of another run."
        },
    )
    num_samples: int = field(
        default=1, metadata={"help": "Answers to each example; several ask for a temperature > 0."}
    )
    num_examples_to_print: int = field(default=0, metadata={"help": "Examples that are printed at the end."})

    sampler: str | None = field(default=None, metadata={"help": "first_hitting, ancestral, confidence or entropy."})
    num_steps: int | None = field(default=None, metadata={"help": "Steps per block of `ancestral`."})
    threshold: float | None = field(default=None, metadata={"help": "Probability that `confidence` asks for."})
    entropy_bound: float | None = field(default=None, metadata={"help": "Bound of `entropy`, in nats."})
    tokens_per_step: int | None = field(default=None, metadata={"help": "Least tokens revealed in a step."})
    left_to_right: bool | None = field(
        default=None, metadata={"help": "Whether `confidence` and `entropy` go through a block from its left."}
    )
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of the tokens' distribution."})
    fill_after_end: bool | None = field(
        default=None, metadata={"help": "Whether what follows <|end|> in its block costs no forward pass."}
    )
    compile_steps: bool | None = field(default=None, metadata={"help": "Whether denoising passes are compiled."})
    max_plan_len: int | None = field(default=None, metadata={"help": "Most tokens of a plan; whole blocks."})
    max_execution_len: int | None = field(default=None, metadata={"help": "Most tokens of an execution."})
    seed: int = field(default=0, metadata={"help": "Of the random draws; one of its own per batch follows from it."})

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("num_samples", 1), ("num_examples_to_print", 0)):
            check_at_least(name, getattr(self, name), low)
        if self.given_plan not in (None, REFERENCE_PLANS) and not Path(self.given_plan).is_file():
            raise ValueError(f"`given_plan` must be {REFERENCE_PLANS!r} or a file, but got {self.given_plan!r}")
        if self.output_dir is None:
            self.output_dir = str(Path(self.model, "eval"))

    def generation_settings(self) -> dict[str, Any]:
        """The settings of HierBD3LMGenerationConfig that are given; the stage follows from `given_plan`."""
        names = {item.name for item in fields(self)} & set(SETTINGS)
        given = {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}
        return given | {"stage": "full" if self.given_plan is None else "execution"}


def parse_arguments(argv: list[str]) -> EvaluationArguments:
    """Reads `--model DIR [--setting value ...]`."""
    return HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)[0]


def main() -> None:
    """Parses, evaluates, prints."""
    args = parse_arguments(sys.argv[1:])
    predictions, summary = evaluate(args)
    for prediction in predictions:
        if prediction["index"] < args.num_examples_to_print:
            print(format_prediction(prediction))
    print(f"{args.model} on {summary['dataset']}, {args.split} ({args.output_dir}/{SUMMARY_FILE})")
    print(format_summary(summary))


def evaluate(args: EvaluationArguments) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluates a checkpoint, or goes on with that; returns the predictions, and the summary that is written."""
    model, tokenizer = load_model(args.model, args.device)
    settings = resolve_settings(model.generation_config, args.generation_settings())
    segment_limits(model.config, settings)
    check_samples(args.num_samples, settings)
    data_args, dataset = load_examples(args)
    if args.given_plan is not None:
        dataset = with_given_plans(dataset, args.given_plan, args.num_samples)
    described = describe_run(args, data_args, dataset, model) | {"num_samples": args.num_samples}
    start_run(args.output_dir, described | settings_of(settings), args.overwrite)
    predictions = predict(model, tokenizer, dataset, settings, args.output_dir, args.batch_size, args.num_samples)
    summary = summarize(predictions) | {
        "model": args.model,
        "dataset": data_args.dataset,
        "split": args.split,
        "given_plan": args.given_plan,
        "seed": args.seed,
        "settings": settings_of(settings),
        "batch_size": args.batch_size,
        "device": str(model.device),
        "versions": versions(),
    }
    write_json(Path(args.output_dir, SUMMARY_FILE), summary)
    return predictions, summary


if __name__ == "__main__":
    main()
