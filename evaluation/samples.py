"""The command line of text quality: `hierbd3lm samples --scorer DIR`, with `--samples FILE` or `--model DIR`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser

from .arguments import SampleArguments


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> SampleArguments:
    """Parse `--scorer DIR` with `--samples FILE` or `--model DIR --num_samples N`, and `[--setting value ...]`."""
    return HfArgumentParser(SampleArguments, prog=prog).parse_args_into_dataclasses(argv)[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Generate samples if a model is given, measure them and print the metrics."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from .text_quality import draw, format_metrics, measure, metrics_path

    path = Path(args.samples) if args.model is None else draw(args)
    metrics = measure(args, path)
    print(f"{path} under {args.scorer} ({metrics_path(path)})")
    print(format_metrics(metrics))


if __name__ == "__main__":
    main()
