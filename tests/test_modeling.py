"""The model is its backbone under our mask: nothing is lost in forward."""

import functools
import itertools
import math

import pytest
import torch
from transformers import CohereConfig, GraniteConfig, MistralConfig, Qwen3ForCausalLM

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.diffusion_hierbd3lm import draw_mask, exact_nelbo, token_nll
from hierbd3lm.masking_hierbd3lm import TokenLayout, needed_tokens
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import layout_from_segments, make_batch, make_dataset, make_model
from .tiny_backbones import (
    BACKBONES,
    NO_IDS,
    ROWS,
    SIZES,
    assert_close,
    logits_of,
    make_backbone_config,
    model_with,
    noisy_batch,
)


def loss_of(model):
    batch, masked = noisy_batch(model.config)
    return token_nll(model(**batch, logits_to_keep=masked).logits, batch["input_ids"][masked], 4).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------------------
# Forward, on every backbone
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_logits_of_the_noisy_stream_and_learns_in_every_weight(backbone):
    model = model_with(backbone)
    batch, _ = noisy_batch(model.config)
    logits = model(**batch).logits
    assert logits.shape == (*batch["noisy_input_ids"].shape, model.config.vocab_size)
    assert torch.isfinite(logits).all()
    for name, gradient in gradients(model, loss_of(model)).items():
        assert torch.isfinite(gradient).all() and gradient.any(), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_to_keep_are_the_full_logits_at_those_places(backbone):
    model = model_with(backbone)
    batch, masked = noisy_batch(model.config)
    with torch.no_grad():
        full = model(**batch).logits
        assert_close(model(**batch, logits_to_keep=masked).logits, full[masked])
        clean = {name: batch[name] for name in ("input_ids", "segment_ids")}
        assert_close(model(**clean, logits_to_keep=masked).logits, model(**clean).logits[masked])


def test_only_the_kept_positions_reach_the_head():
    model = model_with("qwen3")
    batch, masked = noisy_batch(model.config)
    counts, head = [], model.get_output_embeddings()
    head.forward = count_tokens(head.forward, counts)
    model(**batch, logits_to_keep=masked)
    assert max(counts) == counts[-1] == masked.sum()  # before it, a probe of one token


@pytest.mark.parametrize("backbone", [*BACKBONES, "cohere", "granite"])
def test_projected_states_are_the_logits_of_the_backbone(backbone):
    """Gemma caps its logits softly, Cohere and Granite scale them, GPT-2 ties its embeddings."""
    scaled = {
        "cohere": CohereConfig(**SIZES | NO_IDS, logit_scale=0.3),
        "granite": GraniteConfig(**SIZES | NO_IDS, logits_scaling=5.0),
    }
    model = model_with(scaled.get(backbone, backbone))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hidden_states = model.backbone.base_model(tokens).last_hidden_state
        assert_close(model.project(hidden_states), model.backbone(tokens).logits)


def test_a_head_that_is_not_known_is_refused(monkeypatch):
    forward = Qwen3ForCausalLM.forward

    @functools.wraps(forward)
    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", doubled)
    with pytest.raises(
        ValueError, match="Qwen3ForCausalLM has a head that is not supported: its logits are not those of the output"
    ):
        model_with("qwen3")


def test_projection_follows_new_output_embeddings():
    model = model_with("qwen3")
    head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    model.set_output_embeddings(head)
    states = torch.randn(3, 32)
    assert torch.equal(model.project(states), head(states))


def count_tokens(forward, counts):
    def counting(hidden_states):
        counts.append(hidden_states.shape[:-1].numel())
        return forward(hidden_states)

    return counting


@pytest.mark.slow
def test_a_compiled_model_has_the_same_loss_and_gradients(compiler):
    model = model_with("qwen3")
    compiled = torch.compile(model)
    for rows in (ROWS, [(6, 2, 2), (3, 1, 3)]):
        batch, masked = noisy_batch(model.config, rows)
        found = []
        for callable_model in (compiled, model):
            logits = callable_model(**batch, logits_to_keep=masked).logits
            found.append(gradients(model, token_nll(logits, batch["input_ids"][masked], 4).sum()))
        for name, gradient in found[0].items():
            assert_close(gradient, found[1][name], atol=1e-4)


def test_hidden_states_that_are_asked_for_are_whole():
    model = model_with("qwen3")
    batch, masked = noisy_batch(model.config)
    clean = {name: batch[name] for name in ("input_ids", "segment_ids")} | {"output_hidden_states": True}
    with torch.no_grad():
        limited, whole = (model(**clean, logits_to_keep=keep).hidden_states[-1] for keep in (masked, None))
    assert_close(limited, whole)


def test_soft_cap_of_the_backbone_is_kept():
    capped, free = (model_with(make_backbone_config("gemma2", final_logit_softcapping=cap)) for cap in (3.0, None))
    free.load_state_dict(capped.state_dict())
    assert_close(logits_of(capped), 3 * torch.tanh(logits_of(free) / 3))
    assert logits_of(free).abs().max() > 3


def test_a_backbone_may_choose_its_own_attention():
    """The soft cap on Gemma2's scores is eager only: the mask is for what the backbone runs, not for what we say."""
    model = model_with("gemma2")
    assert model.backbone.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does not support"):
        model_with("gemma2", attn_implementation="sdpa")


WINDOWED = {
    "gemma3": lambda window: make_backbone_config("gemma3", sliding_window=window),
    "gemma2": lambda window: make_backbone_config("gemma2", sliding_window=window),
    "mistral": lambda window: MistralConfig(**SIZES, sliding_window=window),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_window_is_in_force(name):
    far, near = (model_with(WINDOWED[name](window)) for window in (512, 4))
    near.load_state_dict(far.state_dict())
    assert (logits_of(far) - logits_of(near)).abs().max() > 1e-2


def test_a_window_reaches_that_far_and_no_further():
    """Two layers of window 4 reach 2 * 3 positions back; nothing else carries a token further."""
    model = model_with(make_backbone_config("gemma3", layer_types=["sliding_attention"] * 2))
    row = [(12, 1, 1)]
    batch, _ = noisy_batch(model.config, row)
    query = 12  # the plan's opener, the first of its block
    with torch.no_grad():
        before = model(**batch).logits[0, query]
        for column in range(query):
            tokens = batch["input_ids"].clone()
            tokens[0, column] = 5 + (tokens[0, column] - 4) % 35
            after = model(**(batch | {"input_ids": tokens})).logits[0, query]
            assert bool((after - before).abs().max() > 1e-5) == (query - column <= 6), column


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic", "yarn"])
def test_a_row_does_not_depend_on_how_long_its_neighbours_are(rope_type):
    """Some rotary embeddings change with the greatest position of a batch."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if rope_type == "longrope" else {}
    positions = 64 if rope_type == "dynamic" else 256
    model = model_with(make_backbone_config("llama", rope_parameters=rope, max_position_embeddings=positions))
    rows = [(3, 1, 1), (16, 6, 6)]  # the second has the greatest length of the model
    assert sum((16, 6 * 4, 6 * 4)) == model.config.sequence_len == 64
    batch, _ = noisy_batch(model.config, rows)
    alone = {name: ids[:1, 13 : 13 + 11] for name, ids in batch.items()}  # from the first question token on
    with torch.no_grad():
        assert_close(model(**batch).logits[0, 16 : 16 + 8], model(**alone).logits[0, 3:])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(backbone):
    without_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if backbone == "gpt2" else {}
    model = model_with(make_backbone_config(backbone, **without_dropout)).train()
    calls = []
    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.register_forward_pre_hook(lambda *call: calls.append(call))
    loss = loss_of(model)
    expected = gradients(model, loss)
    assert len(calls) == 2
    model.gradient_checkpointing_enable()
    checkpointed = loss_of(model)
    actual = gradients(model, checkpointed)
    assert len(calls) == 2 + 2 + 2  # the layers have run again in the backward pass
    assert_close(checkpointed, loss)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, atol=1e-4)


def test_return_dict_false_gives_a_tuple():
    model = model_with("qwen3")
    batch, _ = noisy_batch(model.config)
    with torch.no_grad():
        output = model(**batch, return_dict=False)
        assert isinstance(output, tuple) and len(output) == 1
        assert torch.equal(output[0], model(**batch).logits)


def test_no_cache_is_built_without_being_asked_for():
    model = model_with("qwen3")
    model.backbone.config.use_cache = True
    batch, _ = noisy_batch(model.config)
    seen = []
    model.backbone.base_model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    model(**batch)
    assert seen == [None]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_attn_implementation_reaches_the_backbone(attn_implementation, tmp_path):
    model = model_with("qwen3", attn_implementation=attn_implementation)
    assert model.backbone.config._attn_implementation == attn_implementation
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, attn_implementation=attn_implementation)
    assert loaded.backbone.config._attn_implementation == attn_implementation
    loaded.set_attn_implementation("eager")
    assert loaded.backbone.config._attn_implementation == "eager"


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="Flash Attention"):
        model_with("qwen3", attn_implementation="flash_attention_2")


@pytest.mark.parametrize("missing", ["position_ids", "block_ids"])
def test_layouts_that_cannot_be_derived_are_asked_for(missing):
    model = model_with("qwen3")
    batch = make_batch([(5, 1, 1)], model.config)
    if missing == "position_ids":
        layout = {"block_ids": batch["segment_ids"]}
    else:
        layout = {"segment_ids": batch["segment_ids"], "example_ids": torch.zeros_like(batch["segment_ids"])}
    with pytest.raises(ValueError, match=f"`{missing}` must be given together with"):
        model(input_ids=batch["input_ids"], **layout)


def test_packed_examples_have_the_logits_that_they_have_alone():
    model = model_with("qwen3")
    alone = [noisy_batch(model.config, [row], seed)[0] for seed, row in enumerate(ROWS)]
    layouts = [layout_from_segments(batch["segment_ids"], 4, 4) for batch in alone]
    packed = {name: torch.cat([batch[name] for batch in alone], dim=1) for name in ("input_ids", "noisy_input_ids")}
    block_ids, position_ids = (torch.cat(ids, dim=1) for ids in zip(*layouts, strict=True))
    example_ids = torch.cat([torch.full_like(ids, i) for i, (ids, _) in enumerate(layouts)], dim=1)
    with torch.no_grad():
        logits = model(**packed, block_ids=block_ids, position_ids=position_ids, example_ids=example_ids).logits
        expected = torch.cat([model(**batch).logits for batch in alone], dim=1)
    assert_close(logits[block_ids > 0], expected[block_ids > 0])


# --------------------------------------------------------------------------------------------------------------------
# What a training pass leaves out
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["qwen3", "gemma3", "gpt2"])
def test_columns_that_are_left_out_change_neither_loss_nor_gradients(backbone):
    model = model_with(backbone)
    batch, masked = noisy_batch(model.config)
    x0 = batch["input_ids"][masked]
    kept = token_nll(model(**batch, logits_to_keep=masked).logits, x0, 4).sum()
    actual = gradients(model, kept)
    full = token_nll(model(**batch).logits[masked], x0, 4).sum()
    assert_close(kept, full)
    for name, gradient in gradients(model, full).items():
        assert_close(actual[name], gradient, atol=1e-4)


def test_left_out_tokens_are_padding_the_last_clean_blocks_and_the_noisy_questions():
    model = model_with("qwen3")
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    batch, masked = noisy_batch(model.config, [(5, 2, 3), (9, 1, 2)])
    model(**batch, logits_to_keep=masked)
    assert lengths == [max((5 + 4 * 4) + 5 * 4, (9 + 2 * 4) + 3 * 4)]


def test_needed_tokens():
    clean = torch.tensor([[-1, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1], [-3, -2, 1, 1, 2, 2]])
    noisy = torch.tensor([[1, 1, 2, 2], [1, 1, -1, -1], [1, 1, 2, 2]])
    block_ids = torch.cat([clean, noisy], dim=1)
    stream_ids = torch.tensor([0] * 6 + [1] * 4).expand_as(block_ids)
    expected = ["0111001111", "1100001100", "1111001111"]
    actual = needed_tokens(TokenLayout(block_ids, stream_ids, torch.zeros_like(block_ids)))
    assert ["".join(map(str, row)) for row in actual.long().tolist()] == expected


# --------------------------------------------------------------------------------------------------------------------
# Likelihood
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["qwen3", "gpt2"])
def test_block_size_one_is_the_autoregressive_likelihood(backbone):
    """The same network token by token: the clean prefix, then one mask token at the position of the next."""
    model = model_with(backbone, block_size=1)
    batch = make_batch([(3, 4, 5), (1, 3, 2)], model.config)
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]
    maskable = model.order.predicted(input_ids, segment_ids)
    with torch.no_grad():
        share = exact_nelbo(
            lambda masked: model.masked_nll(masked, input_ids, segment_ids=segment_ids),
            layout_from_segments(segment_ids, 1, 1)[0],
            maskable,
        )
        for row in range(2):
            tokens = input_ids[row, segment_ids[row] >= 0].tolist()
            expected = [
                0.0
                if token in (2, 3) or place < (3, 1)[row]
                else next_token_nll(model, tokens[:place], token, (3, 1)[row])
                for place, token in enumerate(tokens)
            ]
            assert_close(share[row, segment_ids[row] >= 0], torch.tensor(expected, dtype=torch.float64))
    assert share.count_nonzero() == maskable.sum() == 4 + 5 + 3 + 2 - 4


def next_token_nll(model, prefix, token, question_len):
    """-log p(token | prefix) from one call of the backbone; the question sees itself, the rest its past."""
    tokens = [*prefix, model.config.mask_token_id]
    mask = torch.ones(len(tokens), len(tokens)).tril().bool()
    mask[:question_len, :question_len] = True
    logits = model.backbone(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0, -1]
    logits[model.config.mask_token_id] = -math.inf
    return float(-logits.log_softmax(dim=-1)[token])


def test_exact_nelbo_is_the_sum_over_every_mask_of_every_block():
    """Each mask in a pass of its own with a loop over blocks, for one row."""
    model = model_with("qwen3", block_size=2, plan_len=8, execution_len=8)
    batch = make_batch([(3, 2, 2)], model.config)
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]
    maskable = model.order.predicted(input_ids, segment_ids)
    blocks = layout_from_segments(segment_ids, 2, 2)[0]
    expected = torch.zeros(input_ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for block in range(1, 5):
            columns = [column for column in range(11) if blocks[0, column] == block and maskable[0, column]]
            for size in range(1, len(columns) + 1):
                subsets = list(itertools.combinations(columns, size))
                for subset in subsets:
                    masked = torch.zeros_like(maskable)
                    masked[0, list(subset)] = True
                    nll = model.masked_nll(masked, input_ids, segment_ids=segment_ids).double()
                    expected[masked] += nll / size / len(subsets)
        actual = exact_nelbo(
            lambda masked: model.masked_nll(masked, input_ids, segment_ids=segment_ids), blocks, maskable
        )
    assert_close(actual, expected)


def test_the_stratified_loss_of_the_model_is_an_estimate_of_its_exact_nelbo():
    model = model_with("qwen3")
    batch = make_batch([(3, 1, 2)] * 64, model.config)
    batch = {name: ids[:1].expand(64, -1) for name, ids in batch.items()}
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]
    blocks = layout_from_segments(segment_ids, 4, 4)[0]
    maskable = model.order.predicted(input_ids, segment_ids)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact = exact_nelbo(
            lambda masked: model.masked_nll(masked, input_ids[:1], segment_ids=segment_ids[:1]),
            blocks[:1],
            maskable[:1],
        ).sum()
        estimates = []
        for _ in range(8):
            draw = draw_mask(blocks, maskable, generator=generator)
            nll = model.masked_nll(draw.masked, input_ids, segment_ids=segment_ids)
            row = draw.masked.nonzero()[:, 0]
            estimates.append(torch.zeros(64).index_add(0, row, nll * draw.weights[draw.masked]))
    estimates = torch.cat(estimates).double()
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - exact) < 4 * error < 0.1 * exact


@pytest.mark.parametrize("fields", [{}, {"algorithm": "ar", "block_size": None}])
def test_a_batch_with_labels_says_where_the_loss_is(fields):
    model = make_model(**fields)
    batch = HierarchicalDataCollator(model.config)(list(make_dataset(2, model.config)))
    with pytest.raises(ValueError, match=r"`labels` must be left out of the batch, .* `HierBD3LMTrainer` trains on"):
        model(**batch)
    labels = batch.pop("labels")
    assert model(**batch).logits.shape == (*labels.shape, model.config.vocab_size)
