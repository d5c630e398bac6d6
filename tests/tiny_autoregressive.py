"""Tiny autoregressive checkpoints without our special tokens, and their conversion."""

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_backbones import make_backbone_config

LENGTHS = {"question_len": 16, "plan_len": 24, "execution_len": 24, "block_size": 4}
NUM_PLAIN = 256 + 2  # bytes, pad and BOS


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Without our special tokens, as a checkpoint of others has it."""
    tokenizer = Tokenizer(BPE(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|pad|>", "<|bos|>")])
    assert tokenizer.get_vocab_size() == NUM_PLAIN
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>")


def autoregressive(backbone="qwen3", vocab_size=NUM_PLAIN, **overrides):
    """A tiny random causal language model in eval mode, drawn wide."""
    model = AutoModelForCausalLM.from_config(make_backbone_config(backbone, vocab_size=vocab_size, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def copy_of_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def convert(source, tokenizer=None, **kwargs):
    return HierBD3LMForBlockDiffusion.from_autoregressive(source, tokenizer or plain_tokenizer(), **LENGTHS, **kwargs)
