"""The command `hierbd3lm`: a table of the package's command lines, each imported when it is asked for."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

PROG = "hierbd3lm"


class Command(NamedTuple):
    """A command line: its place in this package, as `module:function`, and its help text."""

    target: str
    help: str


COMMANDS = {
    "train": Command("train:main", "train a model from a recipe, from scratch or from an open checkpoint"),
    "grpo": Command("rl.command:main", "train a model with rewards for its answers: GRPO on TRL"),
    "eval": Command("eval_gsm8k:main", "have a checkpoint answer problems, and score the answers"),
    "generate": Command("serving.generate:main", "answer a question, a file of questions or a dataset; chat"),
    "serve": Command("serving.serve:main", "serve a model: an OpenAI-compatible API over HTTP"),
    "ppl": Command("evaluation.ppl:main", "measure the likelihood of a dataset: nats, bits and perplexity per token"),
    "plans": Command("data.plans.write_plans:main", "have a language model write plans for solved problems"),
    "analyze": Command("evaluation.analyze:main", "measure how much executions depend on their plans"),
    "samples": Command("evaluation.samples:main", "judge texts written from nothing under another model"),
    "mask": Command("evaluation.mask:main", "draw the training mask, as text or as an image"),
    "push": Command("hub.push:main", "push a checkpoint or written plans to the Hub, with a card"),
    "convert": Command("convert.published:main", "convert a published BD3-LM or MDLM checkpoint"),
    "lm-eval": Command("evaluation.lm_eval.__main__:main", "run lm-evaluation-harness with the model and tasks here"),
    "demo": Command("demo.app:main", "show in the browser how a checkpoint denoises plan and execution"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `COMMAND [argument ...]` by the command's own `main`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(format_help())
        return
    if argv[0] == "--version":
        print(f"{PROG} {importlib.import_module('..', __package__).__version__}")
        return
    name, *arguments = argv
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"{PROG}: there is no command {name!r}; did you mean `{PROG} {nearest}`?", file=sys.stderr)
        raise SystemExit(2)
    module, function = COMMANDS[name].target.split(":")
    getattr(importlib.import_module(f"..{module}", __package__), function)(arguments, prog=f"{PROG} {name}")


def format_help() -> str:
    """Return the table of commands."""
    rows = [f"  {name:<9}{command.help}" for name, command in COMMANDS.items()]
    usage = f"usage: {PROG} COMMAND [--setting value ...]"
    return "\n".join([usage, "", "commands:", *rows, "", f"`{PROG} COMMAND --help` lists a command's settings."])
