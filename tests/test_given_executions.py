"""An execution that starts with given tokens is continued, in every algorithm, and costs what is left of it."""

import pytest
import torch

from .tiny_algorithms import ALL
from .tiny_generation import GIVEN_PLAN, PAD, RAGGED_QUESTIONS, left_pad, right_pad, speaker, tokens_of

PLANS = [GIVEN_PLAN[: 1 + i % 5] for i in range(len(RAGGED_QUESTIONS))]
SETTINGS = {"stage": "execution", "sampler": "confidence", "threshold": 0.35}


def generate(model, rows, starts=None, **settings):
    """The executions of some rows, in one batch."""
    questions, plans = ([texts[row] for row in rows] for texts in (RAGGED_QUESTIONS, PLANS))
    if starts is not None:
        settings["execution_ids"] = right_pad(starts)
    inputs = left_pad(questions)
    mask = left_pad([[1] * len(question) for question in questions], pad=0)
    return model.generate(inputs, mask, plan_ids=right_pad(plans), **(SETTINGS | settings))


def algorithm(name, end_bias=-30.0):
    size = None if "block_size" in ALL[name] else 6
    return speaker(end_bias=end_bias, **(ALL[name] | {"plan_block_size": size, "execution_block_size": size}))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_given", [1, 4, 6, 9])
def test_given_tokens_stay_and_the_batch_equals_its_rows(name, num_given):
    model = algorithm(name)
    rows = list(range(len(RAGGED_QUESTIONS)))
    starts = [[5 + (row + place) % 30 for place in range(num_given - row % 2)] for row in rows]
    output = generate(model, rows, starts)
    for row, start in zip(rows, starts, strict=True):
        written = tokens_of(output.execution[row])
        assert written[: len(start)] == start and len(written) > len(start)
        assert tokens_of(output.plan[row]) == PLANS[row]
        alone = generate(model, [row], [start]) if start else generate(model, [row])
        assert tokens_of(alone.execution[0]) == written
        assert alone.num_forward_passes[0] == output.num_forward_passes[row]
        torch.testing.assert_close(alone.tokens_per_forward[0], output.tokens_per_forward[row])


@pytest.mark.parametrize("name", ["hier", "bd3lm", "ar"])
@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_given_start_of_whole_blocks_is_continued_as_it_was(name, num_blocks):
    """Greedy: the execution continues as without the start, in the passes that its later blocks took."""
    model = algorithm(name, end_bias=4.0)
    for row in range(len(RAGGED_QUESTIONS)):
        whole = generate(model, [row])
        ids = tokens_of(whole.execution[0])
        # content before the end of a block of six; the flat order has blocks across plan and execution
        edge = {"hier": 5, "ar": 4, "bd3lm": (-len(PLANS[row]) - 3) % 6}[name] * num_blocks
        if edge >= len(ids):
            continue
        output = generate(model, [row], [ids[:edge]])
        assert tokens_of(output.execution[0]) == ids
        assert torch.equal(output.sequences, whole.sequences)
        if edge:
            assert output.num_forward_passes[0] < whole.num_forward_passes[0]
        else:
            assert output.num_forward_passes[0] == whole.num_forward_passes[0]
        num_tokens = round((output.tokens_per_forward * output.num_forward_passes).item())
        assert num_tokens == len(ids) - edge + output.finished.item()


@pytest.mark.parametrize(
    "execution_ids, settings, message",
    [
        ([[7, 8]], {"stage": "full", "plan_ids": None}, "`execution_ids` must be given for stage='execution' alone"),
        ([[7], [8]], {}, r"`execution_ids` must be \(batch, length\) with batch 1, got \(2, 1\)"),
        ([[7] * 11], {}, "`execution_ids` must have at most 10 tokens, but got 11"),
        ([[7] * 5], {"max_execution_len": 6}, "`execution_ids` must have at most 4 tokens, but got 5"),
        ([[7, PAD, 7]], {}, "`execution_ids` must be padded on the right"),
        ([[7, 4]], {}, "`execution_ids` must hold content of the execution only, but got the mask token"),
    ],
)
def test_what_is_no_start_of_an_execution_is_refused(execution_ids, settings, message):
    given = {"plan_ids": torch.tensor([GIVEN_PLAN]), "stage": "execution"} | settings
    with pytest.raises(ValueError, match=message):
        speaker().generate(torch.tensor([[7, 8]]), execution_ids=torch.tensor(execution_ids), **given)
