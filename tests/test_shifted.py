"""Shifted prediction and a causal question: with blocks of one token a converted model is the checkpoint."""

import functools
import itertools
from unittest import mock

import pytest
import torch

from hierbd3lm import HierarchicalDataCollator, HierBD3LMConfig, HierBD3LMForBlockDiffusion
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.training.objectives import Autoregression, BlockDiffusion, make_objective

from .reference_generation import denoise
from .tiny import TINY_TOKEN_IDS, make_model
from .tiny_algorithms import ALL, OWN_SIZE
from .tiny_backbones import BACKBONES, make_backbone_config

PAD, END, PLAN, EXECUTION, MASK = range(5)  # tiny.TINY_TOKEN_IDS
SHIFTED = {"prediction": "shifted", "question_attention": "causal"}
LENGTHS = {"question_len": 12, "plan_len": 12, "execution_len": 12}
EXAMPLES = [
    {"question_ids": [7, 8, 9], "plan_ids": [10, 11, 12, 13, 14], "execution_ids": [15, 16]},
    {"question_ids": [17, 9, 21, 22, 30], "plan_ids": [33], "execution_ids": [15, 36, 39, 8, 8, 6]},
    {"question_ids": [], "plan_ids": [], "execution_ids": [5]},
]


@functools.cache
def speaker(backbone="qwen3", **overrides):
    """A random model that predicts `<|end|>` now and then; shared: no test may change it.

    In float64, but for Gemma 2, whose eager attention takes its softmax in float32.
    """
    torch.manual_seed(0)
    config = make_backbone_config(backbone, tie_word_embeddings=False)
    attention = {"attn_implementation": "eager" if backbone == "gemma2" else "sdpa"}
    model = make_model(**(LENGTHS | SHIFTED | attention | {"backbone_config": config} | overrides))
    model = model if backbone == "gemma2" else model.double()
    bias = torch.zeros(40, dtype=model.dtype)
    bias[[PAD, PLAN, EXECUTION, MASK]], bias[END] = -30.0, 3.0
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


def laid_out(model, examples=EXAMPLES):
    return with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))


def next_token_nll(backbone, batch):
    """NLL of every token by the plain causal language model, row by row and without padding."""
    nll = torch.zeros(batch["input_ids"].shape, dtype=torch.float64)
    for row, (ids, segments) in enumerate(zip(batch["input_ids"], batch["segment_ids"], strict=True)):
        real = (segments >= 0).nonzero()[:, 0]
        log_probs = backbone(ids[real][None]).logits[0].double().log_softmax(dim=-1)
        nll[row, real[1:]] = -log_probs[:-1].gather(1, ids[real[1:], None])[:, 0]
    return nll


# Blocks of one token: the checkpoint itself


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_likelihood_of_blocks_of_one_token_is_that_of_the_checkpoint(backbone):
    model = speaker(backbone, block_size=1)
    batch, objective = laid_out(model), make_objective(model.config)
    assert isinstance(objective, Autoregression)
    with torch.no_grad():
        expected = (next_token_nll(model.backbone, batch) * batch["maskable"]).float()
        assert batch["maskable"].sum() == 5 + 1 + 2 + 1 + 1 + 1 + 6 + 1 + 1 + 1 + 1
        torch.testing.assert_close(objective.token_nelbo(model, batch), expected, atol=1e-5, rtol=0)
        # The noisy stream of the general path gives the same: every block is one masked token.
        general = BlockDiffusion(model.config)
        wide = HierBD3LMForBlockDiffusion(model.config)
        general.order = general_order(model.order)
        wide.backbone, wide.order = model.backbone, general.order
        torch.testing.assert_close(general.token_nelbo(wide.eval(), batch), expected, atol=1e-6, rtol=0)


def general_order(order):
    """The order of one-token blocks that does not know that it needs no noise."""

    class Order(type(order)):
        is_causal = predicts_from_clean = False

    return Order(**{name: getattr(order, name) for name in order.__dataclass_fields__})


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"algorithm": "bd3lm"}, {"plan_len": 0}], ids=["hier", "bd3lm", "no plan"])
@torch.no_grad()
def test_blocks_of_one_token_need_no_noisy_stream_after_a_bidirectional_question(fields, copies):
    model = speaker(block_size=1, question_attention="bidirectional", **fields)
    examples = EXAMPLES if model.config.plan_len else [example | {"plan_ids": []} for example in EXAMPLES]
    batch, objective = laid_out(model, examples), make_objective(model.config)
    general = BlockDiffusion(model.config)
    general.order = general_order(model.order)
    with mock.patch.object(model.backbone.model, "forward", wraps=model.backbone.model.forward) as passes:
        actual = objective.token_nelbo(model, batch, noisy_copies=copies)
        expected = general.token_nelbo(model, batch, noisy_copies=copies)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert (actual > 0).equal(batch["maskable"])
    one, two = (call.kwargs["input_ids"].numel() for call in passes.call_args_list)
    assert one == copies * batch["input_ids"].numel()
    assert two > 1.5 * one / copies


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("algorithm", ["hier", "bd3lm"])
def test_greedy_generation_in_blocks_of_one_token_is_that_of_the_checkpoint(backbone, algorithm):
    model = speaker(backbone, block_size=1, algorithm=algorithm)
    generator, num_ended = torch.Generator().manual_seed(0), 0
    for length in [0, *range(1, 11)] * 5 if backbone == "llama" else range(1, 11):
        question = torch.randint(5, 40, (1, length), generator=generator)
        output = model.generate(question, stage="plan", sampler="first_hitting")
        prompt = torch.cat([question, torch.tensor([[PLAN]])], dim=1)
        limit = LENGTHS["plan_len"] if algorithm == "hier" else 2 * LENGTHS["plan_len"]
        written = model.backbone.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=limit - 1,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=PAD,
            suppress_tokens=[PAD, PLAN, EXECUTION, MASK],
        )
        assert output.sequences[0].tolist() == written[0].tolist()
        assert int(output.num_forward_passes) == written.shape[1] - prompt.shape[1]
        num_ended += END in written[0]
    assert num_ended


@pytest.mark.parametrize("length", [0, 5])
def test_an_execution_without_a_plan_follows_its_opener_in_blocks_of_one_token(length):
    model, question = speaker(block_size=1, plan_len=0), [*range(7, 7 + length)]
    output = model.generate(torch.tensor([question], dtype=torch.long))
    expected = denoise(model, question)
    assert output.sequences[0].tolist() == expected.sequence and expected.sequence[length] == EXECUTION
    assert [token for token in output.execution[0].tolist() if token != PAD] == expected.execution
    assert int(output.num_forward_passes) == expected.num_forward_passes


def test_a_pass_over_one_token_blocks_encodes_one_token():
    """A step costs what a step of the autoregressive model costs: nothing is encoded that predicts nothing."""
    model, lengths = speaker(block_size=1), []
    hook = model.backbone.base_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(torch.tensor([[7, 8, 9]]), sampler="first_hitting")
    hook.remove()
    assert lengths[0] == 3 + 1
    assert set(lengths[1:]) == {1, 2}  # two where the opener of the execution follows the last token of the plan
    assert lengths[1:].count(2) == 1


# Larger blocks


@pytest.mark.parametrize("backbone", ["qwen3", "gemma3"])
@pytest.mark.parametrize("question_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 2), (1, 4), (12, 12)])
def test_generation_equals_recomputing_everything(backbone, question_attention, sizes):
    fields = {"question_attention": question_attention, "block_size": None}
    fields |= dict(zip(("plan_block_size", "execution_block_size"), sizes, strict=True))
    model, answers = speaker(backbone, **fields), []
    samplers = [{"sampler": "first_hitting"}, {"sampler": "confidence", "threshold": 0.3}]
    for settings, temperature, seed in itertools.product(samplers, [0.0, 1.0], range(2)):
        settings = settings | {"temperature": temperature, "seed": seed}
        for question in ([7, 8, 9, 10, 11], [], [30]):
            output = model.generate(torch.tensor([question], dtype=torch.long), **settings)
            expected = denoise(model, question, **settings)
            assert output.sequences[0].tolist() == expected.sequence, settings
            assert int(output.num_forward_passes) == expected.num_forward_passes
            answers.append(tuple(expected.sequence))
    assert len(set(answers)) > 6


def nelbo_by_definition(model, example):
    """Sum over blocks and masks of each block, from one pass of the bare backbone for each mask."""
    config, batch = model.config, laid_out(model, [example])
    ids, blocks = batch["input_ids"][0].tolist(), batch["block_ids"][0].tolist()
    total = torch.zeros(2, dtype=torch.float64)
    for block in range(1, max(blocks) + 1):
        places = [place for place, other in enumerate(blocks) if other == block]
        free = [place for place in places if batch["maskable"][0, place]]
        stop = places[-1] + 1
        mask = torch.tensor([[k <= q for k in blocks[:stop]] for q in blocks[:stop]])[None, None]
        for size in range(1, len(free) + 1):
            masks = list(itertools.combinations(free, size))
            for masked in masks:
                tokens = [MASK if place in masked else token for place, token in enumerate(ids[:stop])]
                logits = model.backbone(
                    torch.tensor([tokens]), attention_mask=mask, position_ids=torch.arange(stop)[None], use_cache=False
                ).logits[0]
                logits[:, config.mask_token_id] = -torch.inf
                log_probs = logits.double().log_softmax(dim=-1)
                nll = -sum(log_probs[place - 1, ids[place]] for place in masked)  # at the token before
                total[int(batch["segment_ids"][0, places[0]]) - 1] += nll / (size * len(masks))
    return total


@pytest.mark.parametrize("question_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_the_exact_nelbo_is_the_sum_over_masks(block_size, question_attention):
    model = speaker(block_size=block_size, question_attention=question_attention)
    with torch.no_grad():
        for example in EXAMPLES[:2]:
            batch = laid_out(model, [example])
            nelbo = make_objective(model.config).exact(model, batch)
            sums = torch.stack([nelbo[batch["segment_ids"] == segment].sum() for segment in (1, 2)])
            torch.testing.assert_close(sums, nelbo_by_definition(model, example), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("ar", "sedd")])
def test_no_prediction_sees_its_own_token_and_only_later_blocks_see_it(name):
    torch.manual_seed(0)
    model = make_model(**(LENGTHS | {"block_size": 4} | ALL[name] | SHIFTED)).double()
    objective, values = BlockDiffusion(model.config), torch.tensor([v for v in range(40) if v != MASK])
    num_moved = 0
    for example in EXAMPLES[:2]:
        batch = laid_out(model, [example])
        masked = batch["maskable"] & (torch.rand(batch["maskable"].shape) < 0.7)
        columns, blocks = masked[0].nonzero()[:, 0], objective.noise_blocks(batch)[0]
        variants = {key: ids.repeat(len(values), 1) for key, ids in batch.items()}
        for place, column in enumerate(columns):
            tokens = variants["input_ids"].clone()
            tokens[:, column] = values
            with torch.no_grad():
                losses = objective.token_losses(
                    model, variants | {"input_ids": tokens}, masked.repeat(len(values), 1)
                ).view(len(values), len(columns))
            # A distribution over the token's values, as the prediction does not know which of them it is.
            assert float((-losses[:, place].double()).exp().sum()) == pytest.approx(1, abs=1e-5)
            spread = losses.amax(dim=0) - losses.amin(dim=0)
            spread[place] = 0
            assert spread[blocks[columns] <= blocks[column]].max() < 1e-5
            num_moved += int((spread > 1e-3).sum())
    one_block = name.startswith("joint") or name == "mdlm"
    assert (num_moved == 0) == one_block


# One checkpoint, several block sizes


@pytest.mark.parametrize("algorithm", ["hier", "bd3lm"])
def test_generate_runs_at_another_block_size(algorithm):
    trained, questions = speaker(block_size=4, algorithm=algorithm), torch.tensor([[7, 8, 9], [0, 30, 31]])
    for block_size in (1, 2, 6):
        other = HierBD3LMForBlockDiffusion(HierBD3LMConfig(**(trained.config.to_dict() | own_size(block_size))))
        other.backbone = trained.backbone
        output = trained.generate(questions, block_size=block_size, sampler="first_hitting")
        expected = other.eval().generate(questions, sampler="first_hitting")
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.num_forward_passes.tolist() == expected.num_forward_passes.tolist()
    assert trained.order.parts[0].block_size == 4


def own_size(block_size):
    return {"plan_block_size": block_size, "execution_block_size": block_size}


def test_block_sizes_that_the_order_cannot_have_are_refused():
    question = torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match=r"`block_size` must divide the maximum lengths \[12, 12\], but got 5"):
        speaker().generate(question, block_size=5)
    with pytest.raises(ValueError, match="`block_size` must be an integer >= 1 or None, but got 0"):
        speaker().generate(question, block_size=0)
    for name in ("ar", "joint, without"):
        model = make_model(**(LENGTHS | ALL[name]))
        with pytest.raises(ValueError, match="`block_size` must be None for autoregressive and joint models"):
            model.generate(question, block_size=4)


# The fields


def test_converted_models_are_shifted_and_models_from_scratch_predict_in_place():
    scratch = HierBD3LMConfig(**TINY_TOKEN_IDS, backbone_config=make_backbone_config("llama"), **LENGTHS, block_size=4)
    assert (scratch.prediction, scratch.question_attention) == ("in_place", "bidirectional")
    ar = HierBD3LMConfig(
        **(scratch.to_dict() | {"algorithm": "ar", "prediction": None, "question_attention": None} | own_size(1))
    )
    assert (ar.prediction, ar.question_attention) == ("shifted", "causal")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction": "shift"}, "`prediction` must be one of in_place, shifted, but got 'shift'"),
        ({"question_attention": True}, "`question_attention` must be one of bidirectional, causal, but got True"),
        ({"algorithm": "ar", "prediction": "in_place", **OWN_SIZE}, "`prediction` must be shifted for algorithm='ar'"),
    ],
)
def test_unknown_kinds_of_prediction_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_model(**(LENGTHS | fields))


def test_a_configuration_with_token_ids_of_other_tools_can_be_built_from_its_dict():
    backbone = make_backbone_config("llama", unk_token_id=0)  # as SmolLM2's
    config = HierBD3LMConfig(**TINY_TOKEN_IDS, backbone_config=backbone, **LENGTHS, block_size=4)
    assert HierBD3LMConfig(**config.to_dict()).to_dict() == config.to_dict()
