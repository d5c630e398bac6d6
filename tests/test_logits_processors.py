"""`logits_processor` and `stopping_criteria` of transformers in `generate`: what they see, and what they do."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
)

from .tiny import make_model
from .tiny_algorithms import ALL
from .tiny_generation import END, MASK, PAD, PLAN, QUESTION, RAGGED_QUESTIONS, SAMPLERS, left_pad, speaker, tokens_of

SIZES = {"question_len": 12, "plan_len": 12, "execution_len": 12, "block_size": 4}
QUESTIONS = left_pad(RAGGED_QUESTIONS)


class Recorder(LogitsProcessor):
    """Changes nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


class StopAfter(StoppingCriteria):
    """Stops the rows whose text has at least `length` tokens."""

    def __init__(self, length, padding):
        self.length, self.padding = length, torch.tensor(padding)

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return (~torch.isin(input_ids, self.padding)).sum(dim=1) >= self.length


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_processor_that_changes_nothing_changes_nothing(sampler):
    model, recorder = speaker(), Recorder()
    settings = {"sampler": sampler, "temperature": 0.7, "seed": 3, **SAMPLERS[sampler]}
    expected = model.generate(QUESTIONS, **settings)
    output = model.generate(QUESTIONS, logits_processor=[recorder], **settings)
    for name in expected:
        assert torch.equal(output[name], expected[name]), name
    assert all(len(input_ids) == len(scores) for input_ids, scores in recorder.calls)


@pytest.mark.parametrize("question", [QUESTION, [7]])
def test_a_processor_sees_what_stands_before_each_candidate(question):
    model, recorder = speaker(plan_block_size=4, execution_block_size=4), Recorder()
    settings = {"sampler": "confidence", "threshold": 1.0, "left_to_right": True}  # a token per pass, from the left
    output = model.generate(torch.tensor([question]), logits_processor=[recorder], **settings)
    answer = output.sequences[0, len(question) :].tolist()
    seen = []
    for input_ids, _ in recorder.calls:
        rows = input_ids.tolist()
        context = rows[0][rows[0].index(question[0]) :]
        seen.append(context)
        assert context == [*question, *answer][: len(context)]  # the first candidate has no mask before it
        for distance, row in enumerate(rows[1:], start=1):  # the candidates after it have masks in between
            assert row[-len(context) - distance :] == context + [MASK] * distance
            assert set(row[: -len(context) - distance]) <= {MASK}
    written = [place for place, token in enumerate(answer) if token != PLAN]
    places = [len(context) - len(question) for context in seen]
    assert places == sorted(set(places)) and set(places) <= set(written)


def test_rows_of_a_batch_are_processed_as_they_are_alone():
    processor = RepetitionPenaltyLogitsProcessor(penalty=1.8)
    model = speaker()
    together = model.generate(QUESTIONS, logits_processor=[processor])
    for row, question in enumerate(RAGGED_QUESTIONS):
        alone = model.generate(torch.tensor([question], dtype=torch.long), logits_processor=[processor])
        answer = tokens_of(together.sequences[row, QUESTIONS.shape[1] :])
        assert answer == tokens_of(alone.sequences[0, len(question) :])
    plain = model.generate(QUESTIONS)
    assert plain.sequences.tolist() != together.sequences.tolist()


@pytest.mark.parametrize(
    "processor", [RepetitionPenaltyLogitsProcessor(penalty=1.5), NoRepeatNGramLogitsProcessor(ngram_size=2)]
)
def test_blocks_of_one_token_are_processed_as_an_autoregressive_model_is(processor):
    fields = {"prediction": "shifted", "question_attention": "causal", "plan_block_size": 1, "execution_block_size": 1}
    fields["end_bias"] = -4.0
    model = speaker(**fields)
    output = model.generate(torch.tensor([QUESTION]), logits_processor=[processor], stage="plan")
    text, banned = torch.tensor([[*QUESTION, PLAN]]), [PAD, MASK, PLAN, model.config.execution_token_id]
    while text[0, -1] != END and text.shape[1] < len(QUESTION) + model.config.plan_len:
        logits = model.backbone(text).logits[:, -1].float()
        scores = processor(text, logits)
        scores[:, banned] = -torch.inf
        text = torch.cat([text, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert tokens_of(output.sequences[0]) == tokens_of(text[0])
    assert output.sequences.tolist() != model.generate(torch.tensor([QUESTION]), stage="plan").sequences.tolist()


@pytest.mark.parametrize("name", ALL)
def test_a_suppressed_token_is_never_written(name):
    torch.manual_seed(0)
    model = make_model(**(SIZES | ALL[name]))
    settings = {"temperature": 1.0, "seed": 0}
    favourite = int(model.generate(QUESTIONS, **settings).sequences[:, QUESTIONS.shape[1] :].flatten().mode().values)
    output = model.generate(QUESTIONS, logits_processor=[SuppressTokensLogitsProcessor([favourite])], **settings)
    assert favourite not in output.sequences[:, QUESTIONS.shape[1] :]


@pytest.mark.parametrize("name", ALL)
def test_a_criterion_stops_each_row_at_the_end_of_a_block(name):
    torch.manual_seed(0)
    model = make_model(**(SIZES | ALL[name]))
    model.backbone.lm_head.weight.data[END] = 0  # an `<|end|>` is rare
    whole = model.generate(QUESTIONS)
    output = model.generate(QUESTIONS, stopping_criteria=[StopAfter(14, [PAD, MASK])])
    for row, question in enumerate(RAGGED_QUESTIONS):
        if model.order.is_aligned:  # the blocks of both segments are written by turns
            answer, of_all = (tokens_of(one.plan[row]) for one in (output, whole))
        else:
            answer, of_all = (tokens_of(one.sequences[row, QUESTIONS.shape[1] :]) for one in (output, whole))
        assert answer == of_all[: len(answer)]
        if len(answer) < len(of_all):
            assert not output.finished[row] and (model.order.is_aligned or len(question) + len(answer) >= 14)
            assert output.num_forward_passes[row] <= whole.num_forward_passes[row]
    stopped = output.sequences.shape[1] < whole.sequences.shape[1]
    assert stopped or len(model.order.parts) == 1 or model.order.is_joint or model.order.is_aligned


def test_a_criterion_that_never_stops_changes_nothing():
    model = speaker()
    output = model.generate(QUESTIONS, stopping_criteria=[StopAfter(1000, [PAD, MASK])])
    assert output.sequences.tolist() == model.generate(QUESTIONS).sequences.tolist()
