"""The command line of lm-evaluation-harness with the models and tasks of this package: `hierbd3lm lm-eval`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

TASKS = Path(__file__).with_name("tasks")
SUBCOMMANDS = ("run", "ls", "validate")
CHAT_FLAGS = ("--apply_chat_template", "--fewshot_as_multiturn", "--system_instruction")
INTRODUCTION = """\
usage: {prog} [run | ls | validate] [--setting value ...]

lm-evaluation-harness with the model `hierbd3lm` and the task `gsm8k_hier`:

  {prog} --model hierbd3lm --model_args pretrained=DIR --tasks gsm8k_hier --batch_size 32

`--include_path` is the folder of this package's tasks unless it is given. What follows is the harness's own help.
"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command line of the harness with the model `hierbd3lm`.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        ValueError: for a flag that puts text around the question of a model `hierbd3lm`; see [`check_flags`].
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError('lm-evaluation-harness is missing: run `pip install -e ".[eval]"`') from error
    if not argv or argv in (["-h"], ["--help"]):
        print(INTRODUCTION.format(prog=prog or "python -m hierbd3lm.evaluation.lm_eval"))
        argv = ["run", "--help"]
    if not {"-h", "--help"} & set(argv):
        from . import adapter  # noqa: F401  (registers the model)
    check_flags(argv)
    sys.argv = ["lm-eval", *with_include_path(argv)]  # which the harness reads
    cli_evaluate()


def check_flags(argv: Sequence[str]) -> None:
    """Raise a ValueError for a flag of chats with `--model hierbd3lm`, which renders questions as in training."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    flags = {argument.partition("=")[0] for argument in argv} & set(CHAT_FLAGS)
    if flags and parser.parse_known_args(argv)[0].model == "hierbd3lm":
        raise ValueError(
            f"`{sorted(flags)[0]}` must not be given with `--model hierbd3lm`, which takes each question as it is: "
            f"text around it is not what the model was trained on"
        )


def with_include_path(argv: list[str]) -> list[str]:
    """Add `--include_path` and the default subcommand to the arguments if they are missing."""
    argv = argv if argv[0] in SUBCOMMANDS else ["run", *argv]
    if any(argument.partition("=")[0] == "--include_path" for argument in argv):
        return argv
    return [*argv, "--include_path", str(TASKS)]


if __name__ == "__main__":
    main()
