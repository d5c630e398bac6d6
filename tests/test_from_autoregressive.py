"""Conversion of an autoregressive checkpoint keeps what it knows, or is refused with the reason."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MambaConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_config
from .tiny_autoregressive import NUM_PLAIN, autoregressive, convert, copy_of_state, plain_tokenizer
from .tiny_backbones import BACKBONES, SIZES, logits_of, make_backbone_config


@pytest.fixture(params=["loaded", "path"])
def source_of(request, tmp_path):
    """Makes what `from_autoregressive` takes of a model: itself, or the path of its checkpoint."""

    def source(model):
        if request.param == "loaded":
            return model
        model.save_pretrained(tmp_path / "autoregressive")
        return str(tmp_path / "autoregressive")

    return source


@pytest.mark.parametrize("backbone", BACKBONES)
def test_conversion_keeps_every_old_weight_bit_for_bit(backbone, source_of):
    old = autoregressive(backbone)
    state = copy_of_state(old)
    model = convert(source_of(old))
    new_state = model.backbone.state_dict()
    assert new_state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(new_state[name][: len(tensor)] if tensor.ndim else new_state[name], tensor), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_conversion_leaves_the_autoregressive_logits_unchanged(backbone, source_of):
    old = autoregressive(backbone)
    tokens = torch.arange(60, 90)[None]
    with torch.no_grad():
        expected = old(tokens).logits
        actual = convert(source_of(old)).backbone(tokens).logits
    assert torch.equal(actual[..., :NUM_PLAIN], expected)


# The mask token and, as the tokenizer has no EOS token, `<|end|>`; openers start from words.
WITHOUT_KIN = [list(SPECIAL_TOKENS).index(role) for role in ("mask", "end")]


@pytest.mark.parametrize("backbone", ["qwen3", "gemma3"])
def test_new_rows_are_near_the_mean_of_the_old_and_differ(backbone, source_of):
    old = autoregressive(backbone)
    model = convert(source_of(old))
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows, new = embeddings.weight[:NUM_PLAIN], embeddings.weight[NUM_PLAIN:]
        assert len(new) == len(SPECIAL_TOKENS)
        distance = (new[WITHOUT_KIN] - rows.mean(dim=0)).norm(dim=1)
        assert (distance < 0.1 * (rows - rows.mean(dim=0)).norm(dim=1).mean()).all()
        assert torch.pdist(new).min() > 0


def test_special_tokens_start_from_tokens_that_say_nearly_the_same():
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "Plan:", "Solution:"])}
    plain = Tokenizer(WordLevel(words | {f"w{n}": n for n in range(4, NUM_PLAIN)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    model = convert(autoregressive(), tokenizer)
    config, weight = model.config, model.get_output_embeddings().weight
    distances = torch.cdist(weight[NUM_PLAIN:], weight[:NUM_PLAIN])
    for token, kin in ((config.end_token_id, 1), (config.plan_token_id, 2), (config.execution_token_id, 3)):
        nearest = distances[token - NUM_PLAIN]
        assert int(nearest.argmin()) == kin
        assert 0 < nearest[kin] < 0.1 * nearest.median()
    assert (weight[config.mask_token_id] - weight[:NUM_PLAIN].mean(dim=0)).abs().max() < 0.05


def test_special_tokens_are_added_and_their_ids_are_in_the_configuration(source_of):
    tokenizer = plain_tokenizer()
    model = convert(source_of(autoregressive()), tokenizer)
    assert len(tokenizer) == NUM_PLAIN + len(SPECIAL_TOKENS) == model.config.vocab_size
    for role, text in SPECIAL_TOKENS.items():
        assert tokenizer(text)["input_ids"] == [getattr(model.config, f"{role}_token_id")]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert (model.config.plan_block_size, model.config.plan_len) == (4, 24)


def test_a_padded_embedding_matrix_is_not_enlarged(source_of):
    """As Qwen's: more rows than tokens. The special tokens take the first spare rows, the others stay."""
    old = autoregressive(vocab_size=NUM_PLAIN + 10)
    before = old.get_input_embeddings().weight.detach().clone()
    after = convert(source_of(old)).get_input_embeddings().weight
    assert after.shape == before.shape
    special = slice(NUM_PLAIN, NUM_PLAIN + len(SPECIAL_TOKENS))
    assert torch.equal(after[: special.start], before[: special.start])
    assert torch.equal(after[special.stop :], before[special.stop :])
    assert (after[special][WITHOUT_KIN] - before[: special.start].mean(dim=0)).abs().max() < 0.05


def test_rows_of_tokens_that_were_added_before_are_near_the_mean_too():
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*SPECIAL_TOKENS.values(), "<|theirs|>"]})
    model = convert(autoregressive(), tokenizer)
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(tokenizer) == NUM_PLAIN + 5
    without_kin = weight[NUM_PLAIN:][[*WITHOUT_KIN, len(SPECIAL_TOKENS)]]
    assert (without_kin - weight[:NUM_PLAIN].mean(dim=0)).abs().max() < 0.05


def test_a_tokenizer_with_ids_beyond_the_rows_of_the_checkpoint_is_refused():
    words = Tokenizer(WordLevel({"a": 0, "b": NUM_PLAIN + 50}, unk_token="a"))
    with pytest.raises(ValueError, match=f"`tokenizer` must have ids below {NUM_PLAIN}, .* but got {NUM_PLAIN + 50}"):
        convert(autoregressive(), PreTrainedTokenizerFast(tokenizer_object=words))


def test_trained_rows_of_special_tokens_are_kept():
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS.values())})
    old = autoregressive(vocab_size=len(tokenizer))
    before = old.get_input_embeddings().weight.detach().clone()
    assert torch.equal(convert(old, tokenizer).get_input_embeddings().weight, before)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_converted_model_is_saved_and_loaded_and_generates(backbone, source_of, tmp_path):
    model = convert(source_of(autoregressive(backbone)))
    model.save_pretrained(tmp_path / "converted")
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "converted")
    assert torch.equal(logits_of(loaded), logits_of(model))
    question = torch.tensor([[60, 61, 62]])
    sequences = [m.generate(question, max_plan_len=4, max_execution_len=8).sequences for m in (model, loaded)]
    assert torch.equal(*sequences) and sequences[0].shape[1] > 3


def test_conversion_keeps_the_mode_of_the_checkpoint(source_of):
    """A model from a path is ready for evaluation, as any other: GPT-2 has dropout, which would show."""
    model = convert(source_of(autoregressive("gpt2")))
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits_of(model), logits_of(model))
    assert all(module.training for module in convert(autoregressive("gpt2").train()).modules())


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_conversion_keeps_the_attention_that_was_asked_for(attn_implementation, tmp_path):
    autoregressive().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attn_implementation)
    with torch.compiler.set_stance("force_eager"):
        models = convert(loaded), convert(tmp_path, attn_implementation=attn_implementation)
    for model in models:
        assert model.config._attn_implementation == attn_implementation
        assert model.backbone.config._attn_implementation == attn_implementation


def test_conversion_keeps_the_dtype_that_was_asked_for(tmp_path):
    autoregressive().save_pretrained(tmp_path)
    model = convert(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_unknown_arguments_for_a_loaded_model_are_refused():
    with pytest.raises(ValueError, match=r"fields of HierBD3LMConfig for a loaded model, but got \['dtype'\]"):
        convert(autoregressive(), dtype=torch.bfloat16)


def test_tied_embeddings_cannot_be_untied_on_the_way(source_of):
    source = source_of(autoregressive("gemma3"))
    assert convert(source, tie_word_embeddings=True).config.tie_word_embeddings
    with pytest.raises(ValueError, match="`tie_word_embeddings` must be True as in the checkpoint, but got False"):
        convert(source, tie_word_embeddings=False)


def test_embeddings_that_are_not_tied_as_the_configuration_says_are_refused():
    model = autoregressive("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="but tie_word_embeddings is True and they are not tied"):
        convert(model)


SMALL = {"vocab_size": NUM_PLAIN, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "bloom": (BloomConfig(vocab_size=NUM_PLAIN, hidden_size=32, n_layer=2, n_head=4), "`position_ids`"),
    "mpt": (MptConfig(vocab_size=NUM_PLAIN, d_model=32, n_layers=2, n_heads=4), "`position_ids`"),
    "falcon with alibi": (FalconConfig(**SMALL, alibi=True), "falcon has alibi=True"),
    "mamba": (MambaConfig(vocab_size=NUM_PLAIN, hidden_size=32, num_hidden_layers=2), "linear_attention"),
    "qwen3 next": (Qwen3NextConfig(**(SIZES | SMALL)), "linear_attention"),
    "llama 4": (Llama4TextConfig(**(SIZES | SMALL)), "chunked_attention"),
    "gpt neo": (
        GPTNeoConfig(
            vocab_size=NUM_PLAIN, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
        ),
        "stays causal inside a block",
    ),
    "bart": (
        BartConfig(vocab_size=NUM_PLAIN, d_model=32, decoder_layers=1, is_encoder_decoder=False),
        "`position_ids`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_work_are_refused_with_the_reason(name):
    config, reason = REFUSED[name]
    backbone = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"`backbone_config`.*{reason}"):
        convert(backbone)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    old = autoregressive()
    name = "model.layers.1.mlp.up_proj.weight"
    old.save_pretrained(tmp_path, state_dict={key: value for key, value in old.state_dict().items() if key != name})
    with pytest.raises(ValueError, match=f"`model_or_path` must hold every weight of .* lacks 1 of them: {name}"):
        convert(tmp_path)


def test_an_encoder_decoder_is_refused_before_anything_is_changed():
    config = T5Config(vocab_size=NUM_PLAIN, d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=64)
    tokenizer = plain_tokenizer()
    with pytest.raises(ValueError, match="must be a decoder, but t5 is an encoder-decoder"):
        convert(T5ForConditionalGeneration(config), tokenizer)
    assert len(tokenizer) == NUM_PLAIN
    with pytest.raises(ValueError, match="must be a decoder, but t5 is an encoder-decoder"):
        HierBD3LMForBlockDiffusion(make_config(backbone_config=config))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("initializer_range", [0.02, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse_a_backbone(kind, initializer_range, dtype):
    """Open checkpoints are wider and deeper than tiny ones: rounding shows in them."""
    size = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 32}
    config = make_backbone_config(kind, vocab_size=NUM_PLAIN, initializer_range=initializer_range, **size)
    assert convert(AutoModelForCausalLM.from_config(config).to(dtype).eval()).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", ["mask", "positions"])
def test_a_backbone_that_ignores_what_it_is_told_is_refused(broken, dtype):
    """An architecture of the future: its signature is right, its attention is not."""
    backbone = autoregressive().to(dtype)
    forward = backbone.base_model.forward

    def deaf(input_ids, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is None:
            return forward(input_ids, **kwargs)
        if broken == "mask":
            attention_mask = torch.ones_like(attention_mask)
        else:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    backbone.base_model.forward = deaf
    reason = {"mask": "does not obey the mask", "positions": "does not obey position_ids"}[broken]
    with pytest.raises(ValueError, match=reason):
        convert(backbone)
    assert not backbone.training
