"""Answers on a terminal, drawn while they are denoised, and a loop of questions."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.decoding import decode_text
from .answers import format_answer, format_costs

if TYPE_CHECKING:
    from rich.text import Text

MASKED = "░"
PROMPT = "> "

Answerer = Callable[[str, BaseStreamer | None], dict[str, Any]]  # question, streamer -> answer


class LiveAnswer(BaseStreamer):
    """Calls `show` with the text of one answer whenever it changes: tokens that are masked are shaded.

    Args:
        show: takes a `rich.text.Text`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig, show: Callable[["Text"], None]):
        self.tokenizer, self.config, self.show = tokenizer, config, show
        self.written: list[int] | None = None  # None before the question

    def put(self, value: torch.LongTensor) -> None:
        """Receive the question, then finished blocks."""
        if self.written is None:
            self.written = []
            return
        self.written += value.flatten().tolist()
        self.show(self.text([]))

    def put_draft(self, value: torch.LongTensor) -> None:
        """Receive the block that is being denoised."""
        self.show(self.text(value.flatten().tolist()))

    def end(self) -> None:
        """Nothing is left to show."""

    def text(self, draft: list[int]) -> "Text":
        """Return the written tokens and the draft: headings for openers, a shade for each masked token."""
        from rich.text import Text

        text = Text()
        headings = {self.config.plan_token_id: "--- Plan\n", self.config.execution_token_id: "--- Execution\n"}
        tokens = [(token, "") for token in self.written or []] + [(token, "yellow") for token in draft]

        def kind(token: tuple[int, str]) -> tuple[str, str]:
            if token[0] in headings:
                return "heading", ""
            return ("masked", "dim") if token[0] == self.config.mask_token_id else ("text", token[1])

        for (what, style), group in groupby(tokens, key=kind):
            ids = [token for token, _ in group]
            if what == "heading":
                text.append(("\n" if text else "") + headings[ids[-1]], "bold")
            else:
                text.append(MASKED * len(ids) if what == "masked" else decode_text(ids, self.tokenizer), style)
        return text


def is_live(config: HierBD3LMConfig) -> bool:
    """Return True if answers can be drawn: on a terminal, with rich, if a model writes one block after the other."""
    is_ready = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    return is_ready and config.execution_order == "chain"


@contextmanager
def live_streamer(tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig) -> Iterator[LiveAnswer]:
    """Draw an answer below the cursor within the context, and remove the drawing afterwards."""
    from rich.live import Live

    with Live(transient=True, auto_refresh=False) as live:
        yield LiveAnswer(tokenizer, config, lambda text: live.update(text, refresh=True))


def print_answer(
    question: str, answer: Answerer, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig, live: bool
) -> None:
    """Print the answer to a question, and its costs on stderr; draw it before if `live`."""
    start = time.perf_counter()
    if live:
        with live_streamer(tokenizer, config) as streamer:
            line = answer(question, streamer)
    else:
        line = answer(question, None)
    print(format_answer(line))
    print(format_costs(line, time.perf_counter() - start), file=sys.stderr, flush=True)


def chat(
    answer: Answerer, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig, read: Callable[[str], str] = input
) -> None:
    """Answer questions until the input ends. Each is answered on its own: the model knows no earlier ones."""
    print("One question per line, each answered on its own. End with Ctrl-D.", file=sys.stderr)
    while True:
        try:
            question = read(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not question.strip():
            continue
        try:
            print_answer(question, answer, tokenizer, config, is_live(config))
        except ValueError as error:  # such as a question that is too long
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
