"""How a tokenizer for a model from scratch is trained on the texts that it will read."""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

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
