"""HTML of tokens, figures and messages. Every text of a user or a model is escaped."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from transformers import PreTrainedTokenizerBase

from ..masking_hierbd3lm import SEGMENT_NAMES
from ..order_hierbd3lm import BlockOrder
from .recording import Token

# lowest confidence of each colour, and its name; a token below the first has colour 0
CONFIDENCE_EDGES = (0.5, 0.7, 0.9, 0.99)
CONFIDENCE_NAMES = ("below 50 %", "50 to 70 %", "70 to 90 %", "90 to 99 %", "99 % or more")
UNDECODED = "\N{REPLACEMENT CHARACTER}"
MOST_TOKENS_OF_A_CHARACTER = 4  # bytes of UTF-8


class TokenTexts:
    """The text of single tokens, as it is in the middle of a text.

    Args:
        tokenizer: decodes a token together with one before it, as some tokenizers drop the first space of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self.start = self._decode([])
        self.known: dict[tuple[int, ...], str] = {}

    def __call__(self, *ids: int) -> str:
        """Return the text of tokens that follow each other."""
        if ids not in self.known:
            self.known[ids] = self._decode(ids)[len(self.start) :]
        return self.known[ids]

    def group(self, ids: Sequence[int], apart: Iterable[int] = ()) -> Iterator[tuple[int, int, str]]:
        """Yield `start, stop, text` of runs of tokens: several where a character is made of several tokens.

        Args:
            apart: ids that are never a part of a character, such as the mask token.
        """
        start, apart = 0, set(apart)
        while start < len(ids):
            stop, text = start + 1, self(ids[start])
            if UNDECODED in text:
                for end in range(start + 2, min(start + MOST_TOKENS_OF_A_CHARACTER, len(ids)) + 1):
                    whole = self(*ids[start:end])
                    if apart.isdisjoint(ids[start:end]) and UNDECODED not in whole:
                        stop, text = end, whole
                        break
            yield start, stop, text
            start = stop

    def _decode(self, ids: Sequence[int]) -> str:
        # a token of the vocabulary's padding has no text
        return self.tokenizer.decode([*self.before, *ids], clean_up_tokenization_spaces=False) or ""


def confidence_colour(confidence: float) -> int:
    """Return the number of the colour of a confidence, 0 for the lowest."""
    return sum(confidence >= edge for edge in CONFIDENCE_EDGES)


def describe_token(token: Token) -> str:
    """Return the tooltip of a committed token."""
    if token.step is None:
        return "given"
    at = f"step {token.step}"
    return at if token.confidence is None else f"{at}, confidence {100 * token.confidence:.1f} %"


def segment_html(tokens: Sequence[Token], texts: TokenTexts, order: BlockOrder, step: int | None = None) -> str:
    """Return the tokens of a segment as coloured spans.

    The opener is left out, and so is the filler after the first `<|end|>`.

    Args:
        step: forward pass whose tokens are marked as new, if any.
    """
    spans = []
    openers = (order.plan_token_id, order.execution_token_id)
    tokens = tokens[1:] if tokens and tokens[0].id in openers else tokens
    ids = [token.id for token in tokens]
    if order.end_token_id in ids:
        ids = ids[: ids.index(order.end_token_id) + 1]
    special = {order.mask_token_id, order.end_token_id, *openers}
    for start, stop, text in texts.group(ids, special):
        token = max(tokens[start:stop], key=lambda token: token.step or 0)
        if token.id == order.mask_token_id:
            spans.append('<span class="tok masked" aria-label="masked"></span>')
            continue
        known = [one.confidence for one in tokens[start:stop] if one.confidence is not None]
        kind = "given" if token.step is None else "plain"
        if known:
            kind = f"c{confidence_colour(min(known))}"
        new = " new" if step is not None and token.step == step else ""
        is_end = token.id == order.end_token_id
        shown, end = ("end", " end") if is_end else (visible(text), "")
        tooltip = escape(describe_token(token), quote=True)
        spans.append(f'<span class="tok {kind}{end}{new}" title="{tooltip}">{shown}</span>')
    return "".join(spans)


def visible(text: str) -> str:
    """Return an escaped text, with a mark before each line break."""
    return escape(text, quote=True).replace("\n", '<i class="break" aria-hidden="true">⏎</i>\n')


def panel_html(title: str, body: str, note: str = "", is_busy: bool = False) -> str:
    """Return a segment's panel: title, note, tokens; `body` is HTML, the others are texts."""
    content = body or '<span class="empty">–</span>'
    return (
        f'<section class="panel" aria-busy="{str(is_busy).lower()}"><header><h3>{escape(title)}</h3>'
        f'<span class="note">{escape(note)}</span></header><div class="tokens">{content}</div></section>'
    )


def figures_html(figures: dict[str, str]) -> str:
    """Return a row of figures: name and value of each."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value) or '–'}</dd></div>" for name, value in figures.items()
    )
    return f'<dl class="figures">{items}</dl>'


def legend_html() -> str:
    """Return the legend of the colours."""
    keys = [f'<span class="tok c{number}">{name}</span>' for number, name in enumerate(CONFIDENCE_NAMES)]
    keys += ['<span class="tok plain">no confidence</span>', '<span class="tok given">given</span>']
    keys += ['<span class="tok masked"></span> masked']
    return f'<div class="legend"><b>Confidence</b>{"".join(f"<span>{key}</span>" for key in keys)}</div>'


def message_html(text: str, is_error: bool = True) -> str:
    """Return a message; an empty text gives none."""
    if not text:
        return ""
    kind, role = ("error", "alert") if is_error else ("hint", "status")
    return f'<div class="message {kind}" role="{role}">{escape(text)}</div>'


def segment_title(segment: int) -> str:
    """Return the heading of a segment."""
    return SEGMENT_NAMES[segment].capitalize()
