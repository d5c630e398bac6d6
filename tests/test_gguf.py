"""A GGUF file is a checkpoint to start from: dequantized, and saved as a plain one."""

import json
from importlib.util import find_spec

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig

from hierbd3lm.backbones_hierbd3lm import find_gguf
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.lora import is_adapter, is_own_checkpoint, load_checkpoint, load_tokenizer

from .tiny_autoregressive import LENGTHS, autoregressive
from .tiny_backbones import logits_of

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is missing")
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_in_gguf(name):
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`"""
    if name == "lm_head.weight":
        return "output.weight"
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{prefix}{NAMES['.'.join(parts[2:] if prefix else parts)]}.weight"


def write_gguf(path):
    """Write a tiny Qwen3 with matrices in 8 bits, and return the weights that the file holds."""
    import gguf

    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<|pad|>", "<|bos|>"]
    model = autoregressive("qwen3", vocab_size=len(tokens), head_dim=128)  # as its reader assumes
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(257)
    expected = {}
    for name, tensor in model.state_dict().items():
        data, kind = tensor.numpy(), None
        expected[name] = tensor
        if tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        writer.add_tensor(name_in_gguf(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@needs_gguf
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_file_is_converted_with_its_weights_and_saved_as_a_plain_checkpoint(given, tmp_path):
    file = tmp_path / "tiny.Q8_0.gguf"
    expected = write_gguf(file)
    path = str(file if given == "file" else tmp_path)
    assert not is_adapter(path) and not is_own_checkpoint(path)
    tokenizer = load_tokenizer(path)
    model = load_checkpoint(path, tokenizer, LENGTHS, dtype="float32")
    state = model.backbone.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name][: len(tensor)], tensor)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "own")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert "quantization_config" not in (tmp_path / "own" / "config.json").read_text()
    assert load_tokenizer(str(tmp_path / "own")).get_vocab() == tokenizer.get_vocab()


def test_a_folder_with_a_configuration_is_no_gguf_checkpoint(tmp_path):
    (tmp_path / "other.gguf").touch()
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model("llama").to_dict()))
    assert find_gguf(str(tmp_path)) == (str(tmp_path), {})
    assert find_gguf("user/name") == ("user/name", {})


def test_one_of_several_gguf_files_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"`model_or_path` must be one GGUF file, but .* has a\.gguf, b\.gguf"):
        find_gguf(str(tmp_path))


def test_the_package_that_reads_gguf_files_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr("hierbd3lm.backbones_hierbd3lm.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"reading a\.gguf needs the package gguf: run `pip install gguf`"):
        find_gguf(str(tmp_path / "a.gguf"))
