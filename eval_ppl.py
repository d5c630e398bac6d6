"""The command line of likelihood: `python eval_ppl.py --model outputs/quickstart [--setting value ...]`.

Nats per token, bits per token and perplexity of plan, execution and both, given the question. They are an upper bound
for every algorithm but `ar` and blocks of one token, for which they are exact. The tokens are the same for all. Of
plain text all is execution: its tokens and an `<|end|>` for each document; and there are bits per byte.
"""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from hierbd3lm.evaluation.arguments import LikelihoodArguments


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> LikelihoodArguments:
    """Reads `--model DIR [--setting value ...]`."""
    return HfArgumentParser(LikelihoodArguments, prog=prog).parse_args_into_dataclasses(argv)[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parses, measures, prints."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from hierbd3lm.evaluation.perplexity import format_result, measure_checkpoint

    result = measure_checkpoint(args)
    print(f"{args.model} ({result['algorithm']}) on {result['dataset']}, {result['split']} ({args.output})")
    print(format_result(result))


if __name__ == "__main__":
    main()
