"""A converted checkpoint computes what the published network computes, which is written down here once more."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hierbd3lm.backbones_hierbd3lm import check_backbone
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.convert import published
from hierbd3lm.convert.dit import BUFFERS, NEVER, PublishedModel, convert, fold_modulation, read_published
from hierbd3lm.dit_hierbd3lm import HierBD3LMDiTConfig, HierBD3LMDiTForCausalLM
from hierbd3lm.evaluation.text_quality import generate_unconditional
from hierbd3lm.masking_hierbd3lm import EXECUTION
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .test_remote_code import CODE, QUESTION, assert_same_model, load_elsewhere
from .tiny import make_model
from .tiny_tokenizer import make_config_for, make_tokenizer

NUM_HEADS, HIDDEN, CONDITION, FREQUENCIES, NUM_BLOCKS = 4, 32, 12, 16, 2
NUM_WORDS = 30
TEXT_END, MASK = NUM_WORDS, NUM_WORDS + 1  # `<|endoftext|>`, BOS and EOS at once, and the mask after the vocabulary
VOCAB_SIZE = NUM_WORDS + 2
SHAPES = {
    "vocab_embed.embedding": (VOCAB_SIZE, HIDDEN),
    "sigma_map.mlp.0.weight": (CONDITION, FREQUENCIES),
    "sigma_map.mlp.0.bias": (CONDITION,),
    "sigma_map.mlp.2.weight": (CONDITION, CONDITION),
    "sigma_map.mlp.2.bias": (CONDITION,),
    "output_layer.norm_final.weight": (HIDDEN,),
    "output_layer.linear.weight": (VOCAB_SIZE, HIDDEN),
    "output_layer.linear.bias": (VOCAB_SIZE,),
    "output_layer.adaLN_modulation.weight": (2 * HIDDEN, CONDITION),
    "output_layer.adaLN_modulation.bias": (2 * HIDDEN,),
}
BLOCK_SHAPES = {
    "norm1.weight": (HIDDEN,),
    "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
    "attn_out.weight": (HIDDEN, HIDDEN),
    "norm2.weight": (HIDDEN,),
    "mlp.0.weight": (4 * HIDDEN, HIDDEN),
    "mlp.0.bias": (4 * HIDDEN,),
    "mlp.2.weight": (HIDDEN, 4 * HIDDEN),
    "mlp.2.bias": (HIDDEN,),
    "adaLN_modulation.weight": (6 * HIDDEN, CONDITION),
    "adaLN_modulation.bias": (6 * HIDDEN,),
}


# The published network, its mask and its sampler


def random_weights(dtype=torch.float32):
    """Drawn wide, modulation included: published training starts that at 0, where scale, shift and gate do nothing."""
    shapes = SHAPES | {f"blocks.{i}.{name}": shape for i in range(NUM_BLOCKS) for name, shape in BLOCK_SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype) + ("norm" in name)
        for name, shape in shapes.items()
    }


def published_logits(weights, tokens, positions, mask, sigma=0.0):
    """Logits `(length, vocabulary)` of tokens `(length,)`; `mask[q, k]` says whether q attends to k."""
    half = FREQUENCIES // 2
    rates = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(half) / half)
    embedded = torch.cat([torch.cos(sigma * rates), torch.sin(sigma * rates)]).to(weights["sigma_map.mlp.0.bias"])
    hidden = F.silu(weights["sigma_map.mlp.0.weight"] @ embedded + weights["sigma_map.mlp.0.bias"])
    condition = F.silu(weights["sigma_map.mlp.2.weight"] @ hidden + weights["sigma_map.mlp.2.bias"])
    x = weights["vocab_embed.embedding"][tokens]
    for i in range(NUM_BLOCKS):
        block = {name: weights[f"blocks.{i}.{name}"] for name in BLOCK_SHAPES}
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, "", condition).split(HIDDEN)
        normed = F.layer_norm(x, [HIDDEN]) * block["norm1.weight"]
        qkv = (normed * (1 + scale1) + shift1) @ block["attn_qkv.weight"].T
        x = x + gate1 * (published_attention(qkv, positions, mask) @ block["attn_out.weight"].T)
        normed = F.layer_norm(x, [HIDDEN]) * block["norm2.weight"]
        inner = F.gelu(
            (normed * (1 + scale2) + shift2) @ block["mlp.0.weight"].T + block["mlp.0.bias"], approximate="tanh"
        )
        x = x + gate2 * (inner @ block["mlp.2.weight"].T + block["mlp.2.bias"])
    shift, scale = modulation(weights, "output_layer.", condition).split(HIDDEN)
    x = F.layer_norm(x, [HIDDEN]) * weights["output_layer.norm_final.weight"] * (1 + scale) + shift
    return x @ weights["output_layer.linear.weight"].T + weights["output_layer.linear.bias"]


def modulation(weights, prefix, condition):
    return weights[f"{prefix}adaLN_modulation.weight"] @ condition + weights[f"{prefix}adaLN_modulation.bias"]


def published_attention(qkv, positions, mask):
    size = HIDDEN // NUM_HEADS
    query, key, value = qkv.view(-1, 3, NUM_HEADS, size).unbind(dim=1)  # each (length, heads, size)
    angles = positions.float()[:, None, None] * (1 / 10_000 ** (torch.arange(0, size, 2) / size))
    turn = torch.complex(angles.cos(), angles.sin())

    def rotated(states):
        first, second = states.split(size // 2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / size**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value).flatten(1)


def published_mask(length, block_size):
    """The training mask of BD3-LM over [xt | x0] (section 3.1), entry by entry."""
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            q_block, k_block = q % length // block_size, k % length // block_size
            q_clean, k_clean = q >= length, k >= length
            block_diagonal = q_block == k_block and q_clean == k_clean
            offset_block_causal = k_block < q_block and k_clean and not q_clean
            block_causal = k_block <= q_block and k_clean and q_clean
            mask[q, k] = block_diagonal or offset_block_causal or block_causal
    return mask


def published_training_logits(weights, xt, x0, block_size):
    length = len(x0)
    positions = torch.arange(length, dtype=weights["vocab_embed.embedding"].dtype).repeat(2)
    return published_logits(weights, torch.cat([xt, x0]), positions, published_mask(length, block_size))[:length]


def published_greedy_text(weights, length, block_size):
    """Every block from left to right, the most probable token at a time; ends with the text or at `length`."""
    tokens = torch.full((length,), MASK)
    tokens[0] = TEXT_END
    for place in range(1, length):
        known = place // block_size * block_size + block_size
        ranks = torch.arange(known) // block_size
        mask = ranks[None, :] <= ranks[:, None]
        logits = published_logits(weights, tokens[:known], torch.arange(float(known)), mask)[place]
        logits[MASK] = -torch.inf
        tokens[place] = logits.argmax()
        if tokens[place] == TEXT_END:
            return tokens[1:place].tolist()
    return tokens[1:].tolist()


# The converted model


def text_tokenizer(num_words=NUM_WORDS):
    words = {f"w{i}": i for i in range(num_words)} | {"<|endoftext|>": num_words}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token=None
    )


def converted(block_size, length, weights=None, attn_implementation="sdpa"):
    published = PublishedModel(weights or random_weights(), NUM_HEADS, block_size, length, [])
    model = convert(published, text_tokenizer())
    model.set_attn_implementation(attn_implementation)
    return model


def noisy_text(length):
    """A text that opens with BOS, and its noisy copy, as published training has them."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(NUM_WORDS, (length,), generator=generator)
    masked = torch.rand(length, generator=generator) < 0.5
    x0[0], masked[0] = TEXT_END, False
    assert 0 < masked.sum() < length - 1
    return x0, masked


def as_ours(tokens, model):
    """The opening BOS is `<|execution|>` here."""
    tokens = tokens[None].clone()
    tokens[0, 0] = model.config.execution_token_id
    return tokens


def test_folding_the_modulation_is_exact():
    weights = random_weights(torch.float64)
    config = HierBD3LMDiTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=NUM_HEADS,
        dtype=torch.float64,
    )
    decoder = HierBD3LMDiTForCausalLM(config).double().eval()
    decoder.load_state_dict(fold_modulation(weights, NUM_HEADS))
    tokens = torch.arange(12) * 7 % VOCAB_SIZE
    mask = torch.ones(12, 12, dtype=torch.bool).tril(3)
    with torch.no_grad():
        logits = decoder(tokens[None], attention_mask=mask[None, None]).logits[0]
    reference = published_logits(weights, tokens, torch.arange(12.0, dtype=torch.float64), mask)
    torch.testing.assert_close(logits, reference, atol=1e-10, rtol=1e-10)
    other = published_logits(weights, tokens, torch.arange(12.0, dtype=torch.float64), mask, sigma=1.0)
    assert (other - reference).abs().max() > 0.1  # so that what is folded is the condition of sigma = 0


@torch.no_grad()
def our_training_logits(model, xt, x0):
    """Logits `(length, vocabulary)` of the noisy stream in a training pass over one text, all of it execution."""
    segment_ids = torch.full((1, len(x0)), EXECUTION)
    return model(as_ours(x0, model), noisy_input_ids=as_ours(xt, model), segment_ids=segment_ids).logits[0]


@pytest.mark.parametrize(
    ("block_size", "length", "attn_implementation"),
    [
        (1, 6, "sdpa"),
        (4, 16, "sdpa"),
        (12, 12, "sdpa"),
        (4, 16, "eager"),
        pytest.param(4, 16, "flex_attention", marks=pytest.mark.slow),
    ],
)
def test_the_training_pass_is_the_published_one(block_size, length, attn_implementation):
    weights = random_weights()
    model = converted(block_size, length, weights, attn_implementation)
    x0, masked = noisy_text(length)
    xt = x0.masked_fill(masked, MASK)
    logits = our_training_logits(model, xt, x0)
    reference = published_training_logits(weights, xt, x0, block_size)
    torch.testing.assert_close(logits[:, :VOCAB_SIZE], reference, atol=1e-4, rtol=1e-4)
    assert (logits[:, VOCAB_SIZE:] == NEVER).all()


def test_long_texts_are_attended_to_tile_by_tile_with_the_same_result():
    weights, length = random_weights(), 160
    model = converted(4, length, weights)
    x0, masked = noisy_text(length)
    xt = x0.masked_fill(masked, MASK)
    logits = our_training_logits(model, xt, x0)[:, :VOCAB_SIZE]
    torch.testing.assert_close(logits, published_training_logits(weights, xt, x0, 4), atol=1e-4, rtol=1e-4)


def test_the_likelihood_is_the_published_one_and_the_new_tokens_have_no_share_in_it():
    weights, length = random_weights(), 16
    model = converted(4, length, weights)
    x0, masked = noisy_text(length)
    with torch.no_grad():
        nll = model.masked_nll(masked[None], as_ours(x0, model), segment_ids=torch.full((1, length), EXECUTION))
    reference = published_training_logits(weights, x0.masked_fill(masked, MASK), x0, 4)
    reference[:, MASK] = -torch.inf  # SUBS
    torch.testing.assert_close(nll, F.cross_entropy(reference[masked], x0[masked], reduction="none"))


def test_mdlm_is_one_block_that_sees_all_of_itself():
    weights, length = random_weights(), 12
    model = converted(length, length, weights)
    x0, masked = noisy_text(length)
    xt = x0.masked_fill(masked, MASK)
    logits = our_training_logits(model, xt, x0)[:, :VOCAB_SIZE]
    everything = torch.ones(length, length, dtype=torch.bool)
    reference = published_logits(weights, xt, torch.arange(float(length)), everything)
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)


def weights_that_vary(end_bias):
    """Weights under which no token is much more probable than the others whatever stands before it."""
    weights, canvas = random_weights(), torch.tensor([TEXT_END] + [MASK] * 15)
    logits = published_logits(weights, canvas, torch.arange(16.0), torch.ones(16, 16, dtype=torch.bool))
    weights["output_layer.linear.bias"] -= logits.mean(dim=0)
    weights["output_layer.linear.bias"][TEXT_END] += end_bias
    return weights


@pytest.mark.parametrize(
    ("block_size", "end_bias", "ends"), [(1, 1, True), (4, 0, False), (4, 0.8, True), (16, 0, False)]
)
def test_generation_writes_what_the_published_network_finds_most_probable(block_size, end_bias, ends):
    weights = weights_that_vary(end_bias)
    settings = HierBD3LMGenerationConfig(stage="execution", sampler="first_hitting")
    output = generate_unconditional(converted(block_size, 16, weights), text_tokenizer(), 2, settings)
    expected = published_greedy_text(weights, 16, block_size)
    assert len(set(expected)) >= 4 and (len(expected) < 15) == ends
    assert output.plan.shape == (2, 0)
    assert output.execution.tolist() == [expected] * 2
    assert output.finished.tolist() == [ends] * 2


def test_the_backbone_obeys_mask_and_positions_and_learns():
    model = converted(4, 16)
    check_backbone(model)
    x0, masked = noisy_text(16)
    nll = model.masked_nll(masked[None], as_ours(x0, model), segment_ids=torch.full((1, 16), EXECUTION))
    nll.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert not model.get_output_embeddings().weight.grad[VOCAB_SIZE:].any()  # nothing makes openers probable


# Reading, refusing, saving


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a folder as the published ones are: a configuration, and weights with the prefix and some buffers."""

    def write(config=None, drop=(), add=(), file="model.safetensors"):
        folder = tmp_path / "published"
        folder.mkdir()
        settings = {"n_heads": NUM_HEADS, "model_length": 16, "block_size": 4, "time_conditioning": False}
        (folder / "config.json").write_text(json.dumps(settings | (config or {})))
        weights = {f"backbone.{name}": tensor for name, tensor in random_weights().items() if name not in drop}
        weights |= {"backbone.rotary_emb.inv_freq": torch.ones(4), "sampling_eps_min": torch.tensor(0.45)}
        weights |= {f"backbone.{name}": torch.ones(1) for name in add}
        save = save_file if file.endswith("safetensors") else torch.save
        save(weights, folder / file)
        return folder

    return write


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_is_read_under_its_published_names(checkpoint, file):
    published = read_published(checkpoint(file=file))
    assert published.weights.keys() == random_weights().keys()
    assert (published.num_heads, published.block_size, published.length) == (NUM_HEADS, 4, 16)
    assert published.buffers == ["rotary_emb.inv_freq", "sampling_eps_min"]
    assert set(published.buffers) < BUFFERS


def test_a_checkpoint_without_a_block_size_is_one_block(checkpoint):
    folder = checkpoint()
    settings = json.loads((folder / "config.json").read_text())
    del settings["block_size"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_published(folder).block_size == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"time_conditioning": True}}, "`time_conditioning` of .* must be False"),
        ({"config": {"causal": True}}, "`causal` of .* must be False"),
        ({"drop": ["blocks.1.norm2.weight"]}, r"lacks \['blocks.1.norm2.weight'\] and has \[\]"),
        ({"add": ["blocks.0.attn_gate"]}, r"lacks \[\] and has \['blocks.0.attn_gate'\] besides"),
    ],
)
def test_what_cannot_be_converted_is_refused(checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        read_published(checkpoint(**changes))


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused():
    published = PublishedModel(random_weights(), NUM_HEADS, 4, 16, [])
    with pytest.raises(ValueError, match=r"`tokenizer` must have 31 tokens, .* are \[31, 32, 33\], .* \[30, 31, 32\]"):
        convert(published, text_tokenizer(num_words=NUM_WORDS - 1))
    with pytest.raises(ValueError, match="`tokenizer` must have a BOS and an EOS token, but lacks eos"):
        convert(published, make_tokenizer())


def test_the_command_saves_a_model_that_loads_with_its_tokenizer(checkpoint, tmp_path, monkeypatch, capsys):
    source, tokenizer_folder, target = checkpoint(), tmp_path / "tokenizer", tmp_path / "converted"
    text_tokenizer().save_pretrained(tokenizer_folder)
    arguments = {"source": source, "tokenizer": tokenizer_folder, "output_dir": target}
    monkeypatch.setattr(sys, "argv", ["convert", *(f"--{name}={value}" for name, value in arguments.items())])
    published.main()
    assert "left out: rotary_emb.inv_freq, sampling_eps_min" in capsys.readouterr().out
    model = HierBD3LMForBlockDiffusion.from_pretrained(target)
    assert isinstance(model.backbone, HierBD3LMDiTForCausalLM)
    expected = converted(4, 16).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict()["execution_block_size"] == 4
    settings = model.generation_config
    assert (settings.sampler, settings.temperature, model.config.plan_len) == ("first_hitting", 1.0, 0)
    tokenizer = AutoTokenizer.from_pretrained(target, config=model.config)
    assert tokenizer.convert_tokens_to_ids(["<|mask|>", "<|plan|>", "<|execution|>"]) == [31, 32, 33]
    assert tokenizer.pad_token_id == model.config.end_token_id == TEXT_END
    assert tokenizer.padding_side == "left"


def test_the_backbone_is_known_to_the_auto_classes():
    config = AutoConfig.for_model("hierbd3lm_dit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert type(config) is HierBD3LMDiTConfig
    assert type(AutoModelForCausalLM.from_config(config)) is HierBD3LMDiTForCausalLM
    backbone = HierBD3LMConfig(backbone_config=config.to_dict() | {"vocab_size": 200_000}).backbone_config
    assert type(backbone) is HierBD3LMDiTConfig


@pytest.fixture(scope="module")
def model_with_code(tmp_path_factory):
    """A model that answers questions on this backbone, saved with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    fields = make_config_for(tokenizer).to_dict()
    ids = {
        name: value
        for name, value in fields.items()
        if name.endswith("_token_id") and name in HierBD3LMConfig.__annotations__
    }
    backbone = HierBD3LMDiTConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = make_model(backbone_config=backbone, **ids)
    folder = tmp_path_factory.mktemp("with code")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_backbone_travels_with_a_checkpoint(model_with_code, tmp_path):
    tokenizer = make_tokenizer()
    model = HierBD3LMForBlockDiffusion.from_pretrained(model_with_code)
    sequences = model.generate(**tokenizer(QUESTION, return_tensors="pt")).sequences
    expected = {"sequences": sequences.tolist(), "texts": tokenizer.batch_decode(sequences)}
    assert {path.name for path in model_with_code.glob("*.py")} == CODE | {"dit_hierbd3lm.py"}
    assert_same_model(load_elsewhere(model_with_code, tmp_path / "home"), expected)
