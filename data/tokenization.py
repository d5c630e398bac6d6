"""Training of a tokenizer for a model that is trained from scratch."""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_hierbd3lm import SPECIAL_TOKENS
from .arguments import check_at_least
from .messages import CHAT_TEMPLATE

PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<|unk|>"

# A word, one digit, or a run of punctuation, each with the space before it; or one more white-space character.
# The pieces of a text concatenate to the text.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
# In the vocabulary of every word-level tokenizer: white space, and each digit with and without a space before it.
COMMON_TEXTS = (" \n", *(f" {digit}{digit}" for digit in range(10)))


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Train a tokenizer that splits numbers into digits and attaches a space to the piece after it.

    Args:
        texts: the training texts.
        vocab_size: vocabulary size of a byte-level BPE, which encodes any text. If omitted, the tokenizer is
            word-level: every piece of `texts` is a token, with ids in order of decreasing frequency, and other words
            become `<|unk|>`.

    `decode` returns exactly the encoded text, unless it has unknown words. No tokens are added at the start or the
    end. The special tokens have the lowest ids: `<|pad|>`, `<|unk|>` (word-level only), then `SPECIAL_TOKENS`.

    Raises:
        ValueError: if `vocab_size` is less than the number of bytes and special tokens.
    """
    tokenizer = _train_words(texts) if vocab_size is None else _train_bpe(texts, vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN if vocab_size is None else None,
        extra_special_tokens=list(SPECIAL_TOKENS.values()),
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def count_unknown(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens that stand for text which is not in the vocabulary.

    A tokenizer has none if its unknown token has another use as well, such as the end-of-text token of GPT-2.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return 0
    return sum(token == unknown for token in token_ids)


def _train_words(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = Fuse()
    trainer = WordLevelTrainer(
        vocab_size=2**31,  # no limit
        special_tokens=[PAD_TOKEN, UNK_TOKEN, *SPECIAL_TOKENS.values()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(COMMON_TEXTS, texts), trainer)
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    special_tokens, alphabet = [PAD_TOKEN, *SPECIAL_TOKENS.values()], ByteLevel.alphabet()
    check_at_least("vocab_size", vocab_size, len(special_tokens) + len(alphabet))
    tokenizer = Tokenizer(BPE())
    to_pieces = Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([to_pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
