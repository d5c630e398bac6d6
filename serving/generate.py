"""The command line of generation: `hierbd3lm generate MODEL ["question"] [--setting value ...]`."""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from hierbd3lm.serving.arguments import GenerateArguments, place_words

USAGE = '%(prog)s MODEL ["QUESTION"] [--setting value ...]'


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> GenerateArguments:
    """Parse `MODEL ["QUESTION"] [--setting value ...]`."""
    parser = HfArgumentParser(GenerateArguments, prog=prog, usage=USAGE)
    return parser.parse_args_into_dataclasses(place_words(argv, ("model", "question")))[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Answer a question, the questions of a file or a dataset, or those typed on the terminal."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)

    from hierbd3lm.serving.generation import Generation

    generation = Generation(args)
    if args.output_dir is not None:
        generation.write_answers()
    elif args.question is not None:
        generation.print_answer()
    elif args.questions is None and args.dataset is None and sys.stdin.isatty():
        generation.chat()
    else:
        generation.print_answers()


if __name__ == "__main__":
    main()
