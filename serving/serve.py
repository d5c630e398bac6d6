"""The command line of the server: `hierbd3lm serve MODEL [--setting value ...]`."""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from hierbd3lm.serving.arguments import ServeArguments, place_words

USAGE = "%(prog)s MODEL [--setting value ...]"
MISSING = 'the server needs fastapi, uvicorn and prometheus-client: run `pip install -e ".[serve]"`'


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> ServeArguments:
    """Parse `MODEL [--setting value ...]`."""
    parser = HfArgumentParser(ServeArguments, prog=prog, usage=USAGE)
    return parser.parse_args_into_dataclasses(place_words(argv, ("model",)))[0]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Serve a model until the process is told to end."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv, prog)
    try:
        from hierbd3lm.serving.process import serve
    except ImportError as error:
        if error.name and error.name.split(".")[0] in ("fastapi", "uvicorn", "prometheus_client"):
            raise ImportError(MISSING) from error
        raise
    serve(args)


if __name__ == "__main__":
    main()
