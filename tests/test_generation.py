"""Generation equals a slow reference that recomputes everything, for single rows and batches."""

import itertools
import math

import pytest
import torch
from scipy import stats

from hierbd3lm.samplers_hierbd3lm import make_sampler
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .reference_generation import MOVE_CHANCE, denoise
from .tiny import make_model
from .tiny_generation import (
    END,
    EXECUTION,
    GIVEN_PLAN,
    MASK,
    PAD,
    PLAN,
    QUESTION,
    RAGGED_QUESTIONS,
    SAMPLERS,
    STAGES,
    assert_same_as_reference,
    generate_one,
    left_pad,
    recorded_passes,
    right_pad,
    rows_of,
    speaker,
)

# Cached generation equals the slow reference


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_generation_equals_recomputing_everything(sampler, temperature, stage):
    plan, answers = GIVEN_PLAN if stage == "execution" else None, []
    block_sizes, drawn = [(4, 6), (6, 4), (1, 3), (2, 1)], [(1.0, 0), (0.8, 1)] if temperature else [(1.0, 0)]
    for number, (sizes, fill, (top_p, seed)) in enumerate(itertools.product(block_sizes, [True, False], drawn)):
        settings = {"fill_after_end": fill, "seed": seed, "top_p": top_p, "temperature": temperature}
        settings |= {"stage": stage, "sampler": sampler} | SAMPLERS[sampler]
        question = RAGGED_QUESTIONS[number % len(RAGGED_QUESTIONS)]
        answers.append(assert_same_as_reference(speaker(*sizes), question, plan, **settings))
    # The claim is empty unless some answers end early, and unless a step reveals several tokens.
    assert {answer.finished for answer in answers} == {True, False}
    if sampler != "first_hitting":
        assert any(answer.tokens_per_forward > 1 for answer in answers)


@pytest.mark.parametrize("backbone", ["gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_backbones_equal_recomputing_everything(backbone, temperature):
    for seed, stage in enumerate(STAGES):
        model = speaker(backbone=backbone, end_bias=0.0)
        plan = GIVEN_PLAN if stage == "execution" else None
        settings = {"temperature": temperature, "seed": seed, "stage": stage, "sampler": "first_hitting"}
        assert_same_as_reference(model, QUESTION, plan, **settings)


def test_eager_attention_equals_recomputing_everything():
    model = speaker(attn="eager")
    output = generate_one(model, QUESTION, sampler="first_hitting")
    assert output.sequences[0].tolist() == denoise(speaker(), QUESTION, sampler="first_hitting").sequence


@pytest.mark.parametrize("noise", MOVE_CHANCE)
def test_ancestral_sampling_follows_the_noise_schedule(noise):
    model = speaker(6, 6, noise=noise, end_bias=0.0)
    for seed, num_steps in enumerate((1, 2, 5, 40)):
        settings = {"num_steps": num_steps, "seed": seed, "temperature": 1.0, "stage": "plan"}
        assert_same_as_reference(model, QUESTION, sampler="ancestral", **settings)


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("sampler", ["confidence", "entropy"])
def test_left_to_right_equals_recomputing_everything(sampler, tokens_per_step):
    pairs = []
    for seed, (bound, temperature) in enumerate(itertools.product((0.1, 0.35, 1.0), (0.0, 1.0))):
        settings = {"threshold": bound} if sampler == "confidence" else {"entropy_bound": 8 * bound}
        settings |= {"temperature": temperature, "seed": seed, "sampler": sampler, "tokens_per_step": tokens_per_step}
        model = speaker(6, 6, end_bias=-1.0)
        assert_same_as_reference(model, QUESTION, left_to_right=True, **settings)
        pairs.append([generate_one(model, QUESTION, left_to_right=order, **settings) for order in (True, False)])
    assert any(not torch.equal(ours.sequences, other.sequences) for ours, other in pairs)


def test_left_to_right_stops_at_the_first_token_that_is_not_sure():
    confidence = torch.tensor([[0.5, 0.95, 0.99, 0.6], [0.99, 0.92, 0.5, 0.99]])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=-1).flatten(0, 1)
    candidates, tokens = torch.ones(2, 4, dtype=torch.bool), torch.zeros(8, dtype=torch.long)
    settings = HierBD3LMGenerationConfig(left_to_right=True)
    assert make_sampler(settings).accept(candidates, logits, tokens).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    settings.left_to_right = False
    assert make_sampler(settings).accept(candidates, logits, tokens).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 1]]
    candidates[0, 0] = False  # what is revealed already is passed over
    settings.left_to_right = True
    accepted = make_sampler(settings).accept(candidates, logits[1:], tokens[1:])
    assert accepted.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("settings", [{"max_plan_len": 4, "max_execution_len": 6}, {"tokens_per_step": 3}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_limits_and_tokens_per_step_equal_recomputing_everything(sampler, settings):
    if "tokens_per_step" in settings and sampler in ("first_hitting", "ancestral"):
        settings = {}  # which it does not read
    for temperature in (0.0, 1.0):
        settings = settings | SAMPLERS[sampler] | {"seed": 3, "temperature": temperature}
        assert_same_as_reference(speaker(end_bias=-1.0), QUESTION, sampler=sampler, **settings)


# Batches


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_greedy_row_does_not_know_its_batch(sampler, stage):
    settings = {"sampler": sampler, "stage": stage} | SAMPLERS[sampler]
    for sizes in [(4, 6), (6, 1), (1, 4)]:
        model, plans = speaker(*sizes), [None] * len(RAGGED_QUESTIONS)
        if stage == "execution":
            plans = [GIVEN_PLAN[: 1 + row % 5] for row in range(len(RAGGED_QUESTIONS))]
        input_ids = left_pad(RAGGED_QUESTIONS)
        plan_ids = right_pad(plans) if stage == "execution" else None
        together = rows_of(model.generate(input_ids, plan_ids=plan_ids, **settings), input_ids.shape[1])
        alone = [
            rows_of(generate_one(model, question, plan, **settings), len(question))[0]
            for question, plan in zip(RAGGED_QUESTIONS, plans, strict=True)
        ]
        assert together == alone
        assert len({row["num_forward_passes"] for row in together}) > 1  # some end before others


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_ended_row_leaves_the_batch_at_once(sampler):
    model = speaker()
    with recorded_passes(model) as passes:
        output = model.generate(left_pad(RAGGED_QUESTIONS), sampler=sampler, **SAMPLERS[sampler])
    taken = output.num_forward_passes
    assert [len(one["noisy_input_ids"]) for one in passes] == [int((taken > n).sum()) for n in range(int(taken.max()))]
    assert taken.min() < taken.max()


def test_a_slow_row_goes_on_to_its_limits_when_a_fast_one_has_ended():
    model, settings, num_left_alone = speaker(4, 4, end_bias=1.0), {"sampler": "confidence", "threshold": 0.2}, 0
    for seed in range(18):
        generator = torch.Generator().manual_seed(seed)
        questions = torch.randint(5, 40, (2, 6), generator=generator)
        together = rows_of(model.generate(questions, **settings), 6)
        assert together == [rows_of(generate_one(model, row.tolist(), **settings), 6)[0] for row in questions]
        fast, slow = sorted(together, key=lambda row: row["num_forward_passes"])
        num_left_alone += fast["num_forward_passes"] < slow["num_forward_passes"] and len(slow["answer"]) == 24
    assert num_left_alone > 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_of_a_sampled_batch_keep_to_themselves(sampler):
    # At temperature 1 a batch draws other numbers than its rows alone, but every row must be a possible answer to
    # its own question: rows with the same question come from the same distribution as a batch of nothing else.
    model = speaker(3, 3, plan_len=3, vocab_size=8, end_bias=0.0)
    settings = {"stage": "plan", "sampler": sampler, "temperature": 1.0, "seed": 0} | SAMPLERS[sampler]
    count = 4000
    mixed = model.generate(torch.tensor([[5, 6], [7, 5]]).repeat(count, 1), **settings).sequences[::2, 3:]
    alone = model.generate(torch.tensor([[5, 6]]).repeat(count, 1), **(settings | {"seed": 1})).sequences[:, 3:]
    other = model.generate(torch.tensor([[7, 5]]).repeat(count, 1), **(settings | {"seed": 2})).sequences[:, 3:]
    assert same_distribution(mixed, alone) > 1e-3
    assert same_distribution(mixed, other) < 1e-6


def same_distribution(first, second):
    """p-value of a chi-square test that two samples of `(count, 2)` tokens come from one distribution."""
    table = torch.stack([torch.bincount(8 * pairs[:, 0] + pairs[:, 1], minlength=64) for pairs in (first, second)])
    return stats.chi2_contingency(table[:, table.sum(dim=0) > 20]).pvalue


@pytest.mark.parametrize("stage", STAGES)
def test_the_side_of_the_padding_changes_nothing(stage):
    model = speaker()
    plan_ids = torch.tensor([GIVEN_PLAN] * len(RAGGED_QUESTIONS)) if stage == "execution" else None
    left, right = left_pad(RAGGED_QUESTIONS), right_pad(RAGGED_QUESTIONS)
    wider = torch.nn.functional.pad(left, (3, 2))
    results = [
        rows_of(model.generate(ids, plan_ids=plan_ids, stage=stage), ids.shape[1]) for ids in (left, right, wider)
    ]
    assert results[0] == results[1] == results[2]


def test_attention_mask_says_what_is_padding():
    model, left = speaker(), left_pad(RAGGED_QUESTIONS)
    garbage = torch.where(left == PAD, 33, left)
    expected = rows_of(model.generate(left), left.shape[1])
    for mask in ((left != PAD), (left != PAD).long()):
        assert rows_of(model.generate(garbage, attention_mask=mask), left.shape[1]) == expected


def test_pad_may_be_the_end_token():
    apart, same = speaker(), speaker(pad_token_id=END)
    expected = rows_of(apart.generate(left_pad(RAGGED_QUESTIONS)), 7)
    output = same.generate(left_pad(RAGGED_QUESTIONS, END))
    for row, wanted in enumerate(expected):
        for name in ("plan", "execution"):
            assert [token for token in output[name][row].tolist() if token != END] == wanted[name]
    assert output.num_forward_passes.tolist() == [row["num_forward_passes"] for row in expected]


@pytest.mark.parametrize("input_ids", [torch.zeros(2, 0, dtype=torch.long), torch.full((2, 3), PAD)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_question_is_answered(stage, input_ids):
    model, plan = speaker(), GIVEN_PLAN if stage == "execution" else None
    plan_ids = None if plan is None else torch.tensor([plan, plan])
    output = model.generate(input_ids, plan_ids=plan_ids, stage=stage, sampler="first_hitting")
    expected = denoise(model, [], plan, stage=stage, sampler="first_hitting")
    for row in rows_of(output, input_ids.shape[1]):
        assert (row["plan"], row["execution"]) == (expected.plan, expected.execution)
        assert row["num_forward_passes"] == expected.num_forward_passes


# Given plans


@pytest.mark.parametrize("pad_token_id", [PAD, END])
@pytest.mark.parametrize("opener", [[], [PLAN]])
@pytest.mark.parametrize("end", [[], [END], [END, END, END]])
def test_a_given_plan_is_used_verbatim(opener, end, pad_token_id):
    model = speaker(pad_token_id=pad_token_id)
    contents = [GIVEN_PLAN, [12], [], [13, 14, 15], list(range(5, 15))]
    plan_ids = right_pad([opener + content + end for content in contents], pad_token_id)
    questions = left_pad(RAGGED_QUESTIONS[: len(contents)], pad_token_id)
    output = model.generate(questions, plan_ids=plan_ids, stage="execution")
    for row, content in enumerate(contents):
        laid_out = [PLAN, *content, END]
        laid_out += [END] * (-len(laid_out) % 4)
        start = questions.shape[1]
        assert output.sequences[row, start : start + len(laid_out) + 1].tolist() == [*laid_out, EXECUTION]
        assert output.plan[row].tolist() == content + [pad_token_id] * (output.plan.shape[1] - len(content))


def test_a_plan_of_no_tokens_may_be_given_in_no_columns():
    model = speaker()
    output = generate_one(model, QUESTION, [], stage="execution")
    assert output.plan.shape == (1, 0)
    assert output.sequences[0, 5:10].tolist() == [PLAN, END, END, END, EXECUTION]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stages_compose(sampler):
    # The second has plans that have ended, and one that was cut at its length.
    for end_bias in (1.5, -1.0):
        model, input_ids = speaker(end_bias=end_bias), left_pad(RAGGED_QUESTIONS)
        settings = {"sampler": sampler} | SAMPLERS[sampler]
        full = model.generate(input_ids, **settings)
        plan = model.generate(input_ids, stage="plan", **settings)
        assert plan.execution.shape == (len(input_ids), 0)
        execution = model.generate(input_ids, plan_ids=plan.plan, stage="execution", **settings)
        for name in ("sequences", "plan", "execution"):
            assert torch.equal(full[name], execution[name])
        assert torch.equal(full.plan, plan.plan)
        assert torch.equal(full.num_forward_passes, plan.num_forward_passes + execution.num_forward_passes)
        assert torch.equal(full.finished, plan.finished & execution.finished)


def test_a_given_plan_may_be_longer_than_max_plan_len():
    # That limits what is denoised; here it would cut what the caller wrote.
    settings = {"max_plan_len": 4, "max_execution_len": 6}
    output = generate_one(speaker(), QUESTION, list(range(5, 14)), stage="execution", **settings)
    assert output.plan[0].tolist() == list(range(5, 14))


def test_a_model_that_loves_special_tokens_writes_a_plan_that_can_be_given_back():
    # A plan's readers tell segments by their openers, and content from padding by the pad token.
    model = make_model()
    with torch.no_grad():
        model.backbone.lm_head.weight[[PAD, PLAN, EXECUTION, MASK]] *= 10
    input_ids = left_pad(RAGGED_QUESTIONS)
    for temperature in (0.0, 1.0):
        plan = model.generate(input_ids, stage="plan", temperature=temperature, seed=0).plan
        output = model.generate(input_ids, plan_ids=plan, stage="execution", temperature=temperature, seed=0)
        assert torch.equal(output.plan, plan)
        assert not torch.isin(output.execution, torch.tensor([PLAN, EXECUTION, MASK])).any()


# Every output


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_output_holds_no_mask_and_agrees_with_itself(sampler, temperature, num_steps):
    # Its mask logit is far above all others, so that any slip would show.
    model, settings = speaker(5, 3, plan_len=15, end_bias=0.5), {"sampler": sampler} | SAMPLERS[sampler]
    settings |= {"temperature": temperature, "seed": num_steps}
    settings |= {"num_steps": num_steps} if sampler == "ancestral" else {}
    input_ids = left_pad(RAGGED_QUESTIONS)
    output = model.generate(input_ids, **settings)
    assert torch.equal(output.sequences[:, :7], input_ids)
    for answer in rows_of(output, 7):
        tokens = answer["answer"]
        assert all(token in {END, PLAN, EXECUTION, *range(5, 40)} for token in tokens)
        assert tokens.count(PLAN) == tokens.count(EXECUTION) == 1
        start = tokens.index(EXECUTION)
        for segment, name, size, most in (
            (tokens[:start], "plan", 5, 15),
            (tokens[start:], "execution", 3, 12),
        ):
            content, rest = answer[name], segment[1 + len(answer[name]) :]
            assert segment[1 : 1 + len(content)] == content
            assert END not in content
            assert set(rest) <= {END}
            assert len(segment) % size == 0
            assert len(rest) <= size  # filled to the end of its block and no further
            assert rest or len(segment) == most
        assert answer["finished"] == all(END in part for part in (tokens[:start], tokens[start:]))


def test_ancestral_finishes_its_last_masks_by_the_model():
    # One step reveals the whole block at once: each token is the model's best guess from nothing but masks.
    model = speaker(6, 6, end_bias=-5.0)
    block = generate_one(model, QUESTION, sampler="ancestral", num_steps=1, stage="plan", max_plan_len=6).plan[0]
    expected = denoise(model, QUESTION, threshold=1e-12, stage="plan", max_plan_len=6)
    assert block.tolist() == expected.plan
    assert PAD not in expected.plan


def test_sequences_rescored_under_the_training_mask_give_the_same_tokens():
    # With every token of a block masked, the training pass shows each block what one-pass sampling has shown it; its
    # segments are read from the openers.
    model = speaker(4, 6, end_bias=4.0)
    output = model.generate(left_pad(RAGGED_QUESTIONS), threshold=1e-12, fill_after_end=False)
    sequences, padding = output.sequences, output.sequences == PAD
    answer = torch.arange(sequences.shape[1]) >= 7
    masked = answer & ~padding & (sequences != PLAN) & (sequences != EXECUTION)
    xt = sequences.masked_fill(masked, MASK)
    logits = model(sequences, attention_mask=~padding, noisy_input_ids=xt, logits_to_keep=masked).logits
    logits[:, MASK] = -math.inf
    rescored = sequences.masked_scatter(masked, logits.argmax(dim=-1))
    content = (sequences != END) & masked
    first_end = (sequences == END) & (sequences.roll(1, dims=1) != END) & masked
    assert content.sum() > 20
    assert first_end.sum() > 5
    for counted in (content, first_end):
        assert torch.equal(rescored[counted], sequences[counted])


def test_sequences_have_the_layout_they_were_generated_with():
    model, seen, derived = speaker(4, 6), [], []
    with recorded_passes(model) as passes:
        output = generate_one(model, QUESTION, sampler="first_hitting")
    for one in passes:
        for ids, blocks, positions in (
            (one["input_ids"], one["block_ids"], one["position_ids"]),
            (one["noisy_input_ids"], one["noisy_block_ids"], one["noisy_position_ids"]),
        ):
            assert ids.shape == blocks.shape == positions.shape
            real = blocks >= 0
            seen += zip(positions[real].tolist(), blocks[real].tolist(), strict=True)
    layout = model._clean_layout(output.sequences, None, None, None, None, None)
    derived = list(zip(layout.position_ids[0].tolist(), layout.block_ids[0].tolist(), strict=True))
    assert sorted(set(seen)) == derived


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(compiler):
    model, questions = speaker.__wrapped__(backbone="qwen3"), left_pad(RAGGED_QUESTIONS)
    for sampler in ("first_hitting", "confidence"):
        settings = {"sampler": sampler, **SAMPLERS[sampler], "temperature": 1.0, "seed": 3}
        eager = model.generate(questions, **settings)
        compiled = model.generate(questions, **settings, compile_steps=True)
        assert compiled.sequences.tolist() == eager.sequences.tolist(), sampler
        assert compiled.num_forward_passes.tolist() == eager.num_forward_passes.tolist(), sampler
        assert len(set(eager.num_forward_passes.tolist())) > 1, "rows left the batch on the way"
