"""A byte-level tokenizer for the tests, trained on nothing: one token per byte."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config

from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig

from .tiny import make_config

PAD, BOS = "<|pad|>", "<|bos|>"


def make_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the four special tokens, a pad token, and a BOS token that it adds to a text if asked to."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (PAD, BOS, *SPECIAL_TOKENS.values())])
    if adds_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS)


def make_config_for(tokenizer: PreTrainedTokenizerFast, **overrides) -> HierBD3LMConfig:
    """The tiny configuration with the vocabulary and the special token ids of a tokenizer."""
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(text) for role, text in SPECIAL_TOKENS.items()}
    return make_config(**({"backbone_config": backbone, "pad_token_id": tokenizer.pad_token_id} | ids | overrides))
