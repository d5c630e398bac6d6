"""Generation in the other orders equals a slow one that recomputes everything, and transformers' own for `ar`."""

import functools
import itertools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .reference_generation import SlowDenoiser
from .tiny import make_model
from .tiny_algorithms import ALL, OWN_SIZE

PAD, END, PLAN, EXECUTION, MASK = range(5)  # tiny.TINY_TOKEN_IDS
QUESTIONS = [[7, 8, 9, 10, 11], [], [12, 13, 14]]
PLANS = [[11, 22], [33, 14, 25, 16, 17], []]
SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"num_steps": 3},
    "confidence": {"threshold": 0.35},
    "entropy": {"entropy_bound": 3.0},
}
PREDICTIONS = {"in_place": {}, "shifted": {"prediction": "shifted", "question_attention": "causal"}}
DIFFUSION = [name for name in ALL if name not in ("hier", "ar", "block by block, with the mask")]


@functools.cache
def speaker(name, **overrides):
    """A tiny random model in float64 that says <|end|> and <|execution|> now and then; shared: none may change it."""
    torch.manual_seed(0)
    sizes = {"question_len": 12, "plan_len": 8, "execution_len": 12, "block_size": 4}
    model = make_model(**(sizes | ALL[name] | overrides)).double()
    bias = torch.zeros(40, dtype=torch.float64)
    bias[[PAD, PLAN]], bias[MASK], bias[END], bias[EXECUTION] = -30.0, 30.0, 4.0, 3.0
    model.backbone.lm_head.bias = torch.nn.Parameter(bias)
    return model


class SlowFlatDenoiser(SlowDenoiser):
    """One run of blocks after the question; it ends at the first <|end|> after <|execution|>."""

    def run(self, question, plan):
        config, stage = self.config, self.settings["stage"]
        self.single_end = stage != "full"
        if stage == "full":
            self.unsaid -= {config.execution_token_id}
        given = [PLAN] if plan is None else [PLAN, *plan, END, EXECUTION]
        size, limit = config.plan_block_size, config.plan_len + config.execution_len
        self.tokens, self.blocks = list(question), self._question_blocks(question)
        self.run_tokens, self.start = [], len(question)
        while len(self.run_tokens) < limit and not self._ended(self.run_tokens):
            block = given[:size] + [MASK] * (size - len(given[:size]))
            given = given[size:]
            if MASK in block:
                block = self._denoise_block(block)
            self.blocks += [1 + len(self.run_tokens) // size] * size
            self.tokens += block
            self.run_tokens += block
        return self

    def _last_end(self, run):
        """Place of the <|end|> that ends the run, or None."""
        if self.settings["stage"] == "plan":
            return run.index(END) if END in run else None
        if EXECUTION not in run:
            return None
        start = run.index(EXECUTION)
        return start + run[start:].index(END) if END in run[start:] else None

    def _ended(self, run):
        return self._last_end(run) is not None

    def _with_end_filled(self, block):
        last = self._last_end(self.run_tokens + block)
        return [END if last is not None and len(self.run_tokens) + i > last else t for i, t in enumerate(block)]


def divide(run):
    """(plan, execution) of a run."""
    middle = run.index(EXECUTION) if EXECUTION in run else len(run)
    plan, execution = run[1:middle], run[middle + 1 :]
    return [part[: part.index(END)] if END in part else part for part in (plan, execution)]


class SlowPairedDenoiser(SlowDenoiser):
    """The i-th blocks of both segments in one canvas, each at the positions of its segment."""

    def run(self, question, plan):
        config = self.config
        self.sizes = {"plan": config.plan_block_size, "execution": config.execution_block_size}
        self.width, self.given = sum(self.sizes.values()), None
        if plan is not None:
            self.given = [PLAN, *plan, END]
            self.given += [END] * (-len(self.given) % self.sizes["plan"])
        self.start, self.rank = len(question), 0
        self.tokens, self.blocks = list(question), self._question_blocks(question)
        self.positions = list(range(len(question)))
        self.segments = {"plan": [], "execution": []}
        while any(not self._ended(segment) for segment in self.segments):
            self.open = [segment for segment in self.segments if not self._ended(segment)]
            canvas = self._denoise_canvas()
            self.tokens += canvas
            self.blocks += self.canvas_blocks
            self.positions += self.canvas_positions
            for segment in self.open:
                self.segments[segment] += canvas[: self.sizes[segment]]
                canvas = canvas[self.sizes[segment] :]
            self.rank += 1
        return self

    def _ended(self, segment):
        written = self.segments[segment]
        return END in written or len(written) >= getattr(self.config, f"{segment}_len")

    def _denoise_canvas(self):
        canvas, self.canvas_blocks, self.canvas_positions, self.columns, column = [], [], [], [], 0
        for number, segment in enumerate(("plan", "execution")):
            size, first = self.sizes[segment], self.rank * self.sizes[segment]
            if segment in self.open:
                block = [MASK] * size
                if segment == "plan" and self.given is not None:
                    block = self.given[first : first + size]
                if first == 0:
                    block[0] = (PLAN, EXECUTION)[number]
                canvas += block
                is_later = number * self.config.hierarchical_mask
                self.canvas_blocks += [1 + self.rank + is_later] * size
                start = self.start + number * self.config.plan_len + first
                self.canvas_positions += range(start, start + size)
                self.columns += range(column, column + size)
            column += size
        return self._denoise_block(canvas)

    def _reveal_ranks(self, size):
        ranks = super()._reveal_ranks(self.width)
        return None if ranks is None else [ranks[column] for column in self.columns]

    def _with_end_filled(self, canvas):
        filled = []
        for segment in self.open:
            size = self.sizes[segment]
            block, canvas = canvas[:size], canvas[size:]
            filled += [END if END in block[: place + 1] else token for place, token in enumerate(block)]
        return filled

    def _logits(self, canvas, places):
        tokens, blocks = self.tokens + canvas, self.blocks + self.canvas_blocks
        self.passes.append(tokens)
        positions = self.positions + self.canvas_positions
        with torch.no_grad():
            logits = self.model.backbone(
                input_ids=torch.tensor([tokens]),
                attention_mask=self._mask(blocks),
                position_ids=torch.tensor([positions]),
                use_cache=False,
            ).logits
        logits = logits[0].float()
        logits[:, sorted(self.unsaid)] = -torch.inf
        shift = self.config.prediction == "shifted"
        return [logits[positions.index(self.canvas_positions[place] - shift)] for place in places]


def cut(segment):
    return segment[1 : segment.index(END)] if END in segment else segment[1:]


def tokens_of(row):
    return [token for token in row.tolist() if token != PAD]


def left_pad(rows):
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows], dtype=torch.long)


def right_pad(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.long)


def check_against_reference(model, question, plan, **settings):
    """Returns the run, for claims about what the cases cover."""
    plan_ids = None if plan is None else torch.tensor([plan], dtype=torch.long)
    output = model.generate(torch.tensor([question], dtype=torch.long), plan_ids=plan_ids, **settings)
    if model.config.is_flat:
        slow = SlowFlatDenoiser(model, settings).run(question, plan)
        run, (plan_, execution) = slow.run_tokens, divide(slow.run_tokens)
        middle = run.index(EXECUTION) if EXECUTION in run else len(run)
        finished = slow._ended(run) and END in run[:middle]
        ends = (END in run[:middle]) + (END in run[middle:])
    else:
        slow = SlowPairedDenoiser(model, settings)
        if plan is not None and model.config.hierarchical_mask:
            return check_against_sequential_reference(model, output, question, plan, settings)
        slow.run(question, plan)
        run = [token for segment in slow.segments.values() for token in segment]
        plan_, execution = map(cut, slow.segments.values())
        finished = all(END in segment for segment in slow.segments.values())
        ends = sum(END in segment for segment in slow.segments.values())
    counted = len(plan_) + len(execution) + ends
    if plan is not None:
        counted -= len(plan_) + 1
    assert output.sequences[0].tolist() == question + run, settings
    assert (tokens_of(output.plan[0]), tokens_of(output.execution[0])) == (plan_, execution), settings
    assert output.finished.tolist() == [finished], settings
    assert output.num_forward_passes.tolist() == [len(slow.passes)]
    assert float(output.tokens_per_forward[0]) == pytest.approx(counted / len(slow.passes))
    return run, finished, slow


def check_against_sequential_reference(model, output, question, plan, settings):
    """A given plan is context, whole, to an execution that is denoised after it."""
    slow = SlowDenoiser(model, settings).run(question, plan)
    assert output.sequences[0].tolist() == slow.sequence, settings
    assert tokens_of(output.execution[0]) == slow.execution, settings
    assert output.num_forward_passes.tolist() == [slow.num_forward_passes]
    return slow.sequence, slow.finished, slow


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_generation_equals_recomputing_everything(name, sampler, prediction):
    runs = []
    cases = itertools.product([0.0, 1.0], [True, False], zip(QUESTIONS, PLANS, strict=True), ["full", "execution"])
    for seed, (temperature, fill, (question, plan), stage) in enumerate(cases):
        settings = {"sampler": sampler, "temperature": temperature, "fill_after_end": fill, "seed": seed}
        plan = plan if stage == "execution" else None
        settings |= {"stage": stage} | SAMPLERS[sampler]
        runs.append(check_against_reference(speaker(name, **PREDICTIONS[prediction]), question, plan, **settings))
    assert any(finished for _, finished, _ in runs)
    assert len({tuple(run) for run, _, _ in runs}) >= 8


@pytest.mark.parametrize("name", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_flat_plan_alone_ends_at_its_first_end(name, temperature):
    for seed, question in enumerate(QUESTIONS):
        settings = {"stage": "plan", "temperature": temperature, "seed": seed}
        run, _, _ = check_against_reference(speaker(name), question, None, **settings)
        assert EXECUTION not in run


@pytest.mark.parametrize("name", [*DIFFUSION, "ar"])
@pytest.mark.parametrize("stage", ["full", "execution"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_row_is_generated_the_same_in_a_batch_and_alone(name, stage, prediction):
    model = speaker(name) if name == "ar" else speaker(name, **PREDICTIONS[prediction])
    plans = PLANS if stage == "execution" else None
    given = {} if plans is None else {"plan_ids": right_pad(plans)}
    together = model.generate(left_pad(QUESTIONS), stage=stage, **given)
    for row, question in enumerate(QUESTIONS):
        given = {} if plans is None else {"plan_ids": right_pad([plans[row]])}
        alone = model.generate(torch.tensor([question], dtype=torch.long), stage=stage, **given)
        for field in ("plan", "execution", "sequences"):
            assert tokens_of(getattr(together, field)[row]) == tokens_of(getattr(alone, field)[0])
        assert together.finished[row] == alone.finished[0]
        assert together.num_forward_passes[row] == alone.num_forward_passes[0]


def test_runs_cover_blocks_with_both_segments_and_without_an_execution():
    cases = itertools.product(QUESTIONS, range(8))
    runs = [check_against_reference(speaker("bd3lm"), q, None, temperature=5.0, seed=s)[0] for q, s in cases]
    assert any(EXECUTION in run and run.index(EXECUTION) % 4 for run in runs)
    assert any(EXECUTION not in run for run in runs)


def test_segments_of_a_pair_end_at_different_blocks():
    counts = set()
    for seed, question in itertools.product(range(6), QUESTIONS):
        _, _, slow = check_against_reference(
            speaker("block by block, without"), question, None, temperature=3.0, seed=seed
        )
        counts.add(tuple(len(segment) // 4 for segment in slow.segments.values()))
    assert any(plan < execution for plan, execution in counts)
    assert any(plan > execution for plan, execution in counts)


# What the backbone writes by itself


def slow_greedy(model, question, plan):
    """Token by token, each from a pass over all before it, until the last <|end|> or the limit."""
    run, passes = [PLAN] if plan is None else [PLAN, *plan, END, EXECUTION], 0
    while len(run) < model.config.plan_len + model.config.execution_len:
        if EXECUTION in run and END in run[run.index(EXECUTION) :]:
            break
        with torch.no_grad():
            logits = model.backbone(torch.tensor([question + run])).logits[0, -1]
        logits[[PAD, PLAN, MASK] + ([EXECUTION] if plan is not None else [])] = -torch.inf
        run.append(int(logits.argmax()))
        passes += 1
    return run, passes


@pytest.mark.parametrize("stage", ["full", "execution"])
def test_ar_writes_greedily_what_its_backbone_predicts(stage):
    model, finished = speaker("ar"), []
    plans = PLANS if stage == "execution" else [None] * 3
    for question, plan in zip([*QUESTIONS, [5, 6], [9]], plans + [plans[0]] * 2, strict=True):
        given = {} if plan is None else {"plan_ids": torch.tensor([plan], dtype=torch.long)}
        output = model.generate(torch.tensor([question], dtype=torch.long), stage=stage, **given)
        run, passes = slow_greedy(model, question, plan)
        assert output.sequences[0].tolist() == question + run
        assert [tokens_of(output.plan[0]), tokens_of(output.execution[0])] == divide(run)
        assert output.num_forward_passes.tolist() == [passes]
        finished.append(output.finished.item())
    assert True in finished


def test_ar_draws_from_its_seed_and_leaves_the_global_generator_alone():
    model = speaker("ar")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    draws = [model.generate(left_pad(QUESTIONS), temperature=1.0, seed=seed).sequences for seed in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])


def test_ar_ignores_what_the_checkpoint_says_of_generation():
    model = make_model(**ALL["ar"])
    expected = model.generate(left_pad(QUESTIONS)).sequences
    model.backbone.generation_config = GenerationConfig(
        eos_token_id=list(range(40)), repetition_penalty=3.0, do_sample=True, top_k=1, pad_token_id=39
    )
    assert torch.equal(model.generate(left_pad(QUESTIONS)).sequences, expected)


def test_ar_streams_the_question_once_and_then_what_is_written():
    class Recorder(BaseStreamer):
        def __init__(self):
            self.values, self.ends = [], 0

        def put(self, value):
            self.values.append(value.flatten().tolist())

        def end(self):
            self.ends += 1

    streamer, model = Recorder(), speaker("ar")
    output = model.generate(torch.tensor([QUESTIONS[0]]), streamer=streamer)
    assert streamer.values[0] == QUESTIONS[0] and streamer.ends == 1
    written = [token for value in streamer.values[1:] for token in value]
    assert written == output.sequences[0, 5:].tolist()


# What is refused


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("hier", {"stage": "joint"}, "`stage` must be one of full, plan, execution, but got 'joint'"),
        ("joint, without", {"stage": "plan"}, "`stage` must not be 'plan' without the hierarchical mask"),
        ("bd3lm", {"max_plan_len": 7}, r"`max_plan_len \+ max_execution_len` must be a multiple of the block size 4"),
        ("bd3lm", {"max_plan_len": 9}, "`max_plan_len` must be a multiple of the block size 1 up to 8, but got 9"),
    ],
)
def test_stages_and_limits_that_an_order_does_not_have_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        speaker(name).generate(left_pad(QUESTIONS), **settings)


def test_limits_of_a_flat_run_are_of_the_sum():
    output = speaker("bd3lm").generate(left_pad(QUESTIONS), max_plan_len=3, max_execution_len=5)
    assert output.sequences.shape[1] <= 5 + 8


def test_the_plan_of_a_joint_model_can_be_denoised_alone():
    model = speaker("joint, with the mask", **OWN_SIZE)
    # first_hitting and greedy: the plan is revealed from left to right in both, and never sees the execution
    plans = [model.generate(left_pad(QUESTIONS), stage=s, sampler="first_hitting").plan for s in ("full", "plan")]
    assert torch.equal(*plans)
