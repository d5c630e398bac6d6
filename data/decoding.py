"""Decoding of segments to text, and whether a tokenizer keeps the answers of executions."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .gsm8k.answers import cut_at_stops, match_strict, reference_answer
from .questions import encode_text

logger = logging.get_logger(__name__)

NUM_SHOWN = 3  # lost answers in the warning


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a segment. Special tokens of the backbone are kept: an answer may have to be cut at one of them."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def decode_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a segment of an answer for a reader, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def count_lost_answers(executions: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the reference executions whose answer is wrong after encoding and decoding, and warn of them.

    A model that generates exactly the tokens of such an execution gets no strict match. Word-piece tokenizers, for
    instance, put spaces into `####`. Executions without an answer are not counted.
    """
    lost, num_answers = [], 0
    for row, execution in enumerate(executions):
        try:
            answer = reference_answer(execution)
        except ValueError:
            continue
        num_answers += 1
        decoded = decode(encode_text(execution, tokenizer, add_special_tokens=False), tokenizer)
        if not match_strict(cut_at_stops(decoded), answer):
            lost.append(f"row {row}: {execution[-30:]!r} becomes {decoded[-30:]!r}")
    if lost:
        logger.warning(
            f"The tokenizer does not keep {len(lost)} of {num_answers} reference answers: no exact match is possible "
            f"there ({'; '.join(lost[:NUM_SHOWN])}). Use a tokenizer that restores texts, such as a byte-level one."
        )
    return len(lost)
