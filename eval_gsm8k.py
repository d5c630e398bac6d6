"""The command line of evaluation: `python eval_gsm8k.py --model outputs/quickstart [--setting value ...]`.

On GSM8K two floors help to read a score: the best constant answer is right in 2.7 % of the test problems, and the best
single number of the question in 6.4 %.
"""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from hierbd3lm.evaluation.arguments import EvaluationArguments


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> EvaluationArguments:
    """Parse `--model DIR [--setting value ...]`."""
    return HfArgumentParser(EvaluationArguments, prog=prog).parse_args_into_dataclasses(argv)[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Evaluate a checkpoint and print the summary."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from hierbd3lm.evaluation.runner import SUMMARY_FILE, evaluate
    from hierbd3lm.evaluation.scoring import format_prediction, format_summary

    predictions, summary = evaluate(args)
    for prediction in predictions:
        if prediction["index"] < args.num_examples_to_print:
            print(format_prediction(prediction))
    print(f"{args.model} on {summary['dataset']}, {args.split} ({args.output_dir}/{SUMMARY_FILE})")
    print(format_summary(summary))


if __name__ == "__main__":
    main()
