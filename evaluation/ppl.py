"""The command line of likelihood: `hierbd3lm ppl --model outputs/quickstart [--setting value ...]`.

Reports nats per token, bits per token and perplexity of plan, execution and both, given the question. They are exact
for `ar` and for blocks of one token, and upper bounds otherwise, over the same tokens. Plain text counts as execution:
its tokens and one `<|end|>` per document; bits per byte are reported too.
"""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from .arguments import LikelihoodArguments


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> LikelihoodArguments:
    """Parse `--model DIR [--setting value ...]`."""
    return HfArgumentParser(LikelihoodArguments, prog=prog).parse_args_into_dataclasses(argv)[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Measure the likelihood of a dataset and print it."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from .perplexity import format_result, measure_checkpoint

    result = measure_checkpoint(args)
    print(f"{args.model} ({result['algorithm']}) on {result['dataset']}, {result['split']} ({args.output})")
    print(format_result(result))


if __name__ == "__main__":
    main()
