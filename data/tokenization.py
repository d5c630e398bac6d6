"""What a tokenizer of this model is: a word-level one trained on texts, or any that has the special tokens."""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_hierbd3lm import SPECIAL_TOKENS

PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"

# A word, one digit, or a run of punctuation, each with the space before it; or one more white-space character.
# The pieces of a text, put together again, are the text.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
# Known whatever the training texts are: white space, and each digit with and without a space before it.
ALWAYS_KNOWN = (" \n", *(f" {digit}{digit}" for digit in range(10)))


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Makes a word-level tokenizer whose vocabulary is every piece of `texts`, numbered by falling frequency.

    Numbers are split into digits, and a space belongs to the piece after it, so `" 12"` is two tokens. `decode` gives
    back exactly the text that was encoded, as long as its words occur in `texts`; others become `<|unk|>`. No token is
    added at the start or the end. The special tokens come first: `<|pad|>`, `<|unk|>`, then `SPECIAL_TOKENS`.
    """
    tokenizer = Tokenizer(WordLevel(unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = Fuse()
    trainer = WordLevelTrainer(
        vocab_size=2**31,  # no limit
        special_tokens=[PAD_TOKEN, UNK_TOKEN, *SPECIAL_TOKENS.values()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(ALWAYS_KNOWN, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        extra_special_tokens=list(SPECIAL_TOKENS.values()),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds those of the four special tokens that the tokenizer lacks, changes no other, and returns how many."""
    tokens = {"extra_special_tokens": list(SPECIAL_TOKENS.values())}
    return tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The `*_token_id` arguments of [`HierBD3LMConfig`] for a tokenizer; without a pad token, pad is end.

    Raises:
        ValueError: if the tokenizer lacks one of the four special tokens; the message names them.
    """
    vocab = tokenizer.get_vocab()
    missing = [text for text in SPECIAL_TOKENS.values() if text not in vocab]
    if missing:
        raise ValueError(
            f"`tokenizer` must have the special tokens {', '.join(SPECIAL_TOKENS.values())}, but lacks "
            f"{', '.join(missing)}; `add_special_tokens(tokenizer)` adds them"
        )
    ids = {f"{role}_token_id": vocab[text] for role, text in SPECIAL_TOKENS.items()}
    pad_token_id = tokenizer.pad_token_id
    return ids | {"pad_token_id": ids["end_token_id"] if pad_token_id is None else pad_token_id}
