"""Command line for writing plans: `hierbd3lm plans [--setting value ...]`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser

from .arguments import WritePlansArguments


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> WritePlansArguments:
    """Parse `[--setting value ...]`."""
    return HfArgumentParser(WritePlansArguments, prog=prog).parse_args_into_dataclasses(argv)[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line, write plans and print the summary."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from .run import PLANS_FILE, write_plans

    summary = write_plans(args)
    print(json.dumps(summary, indent=2))
    print(f"{Path(args.output_dir, PLANS_FILE)} has a plan for {summary['num_plans']} of {summary['num_problems']}")


if __name__ == "__main__":
    main()
