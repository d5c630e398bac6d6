"""The command line of plan dependence: `hierbd3lm analyze --model DIR [--setting value ...]`."""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from .arguments import AnalysisArguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Analyse a checkpoint and print the tables."""
    parser = HfArgumentParser(AnalysisArguments, prog=prog)
    args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)[0]

    from .plan_dependence import ANALYSIS_FILE, analyse_checkpoint
    from .plan_dependence_report import format_tables

    result = analyse_checkpoint(args)
    print(f"{args.model} on {result['dataset']}, {args.split} ({args.output_dir}/{ANALYSIS_FILE})")
    print(format_tables(result))


if __name__ == "__main__":
    main()
