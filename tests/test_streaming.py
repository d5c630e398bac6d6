"""Streamers receive the prompt, drafts and finished blocks."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer

from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS
from hierbd3lm.denoising_hierbd3lm import stream
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model
from .tiny_generation import (
    END,
    EXECUTION,
    MASK,
    PLAN,
    QUESTION,
    RAGGED_QUESTIONS,
    SAMPLERS,
    generate_one,
    left_pad,
    speaker,
    tokens_of,
)
from .tiny_tokenizer import make_config_for, make_tokenizer


class RecordingStreamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value.tolist()))

    def end(self):
        self.events.append(("end", None))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sizes", [(4, 6), (1, 4)])
def test_a_streamer_receives_prompt_drafts_and_blocks(sampler, sizes):
    model, streamer = speaker(*sizes, end_bias=0.0), RecordingStreamer()
    settings = {"sampler": sampler, "temperature": 1.0, "seed": 0} | SAMPLERS[sampler]
    output = generate_one(model, QUESTION, streamer=streamer, **settings)
    assert streamer.events[0] == ("put", QUESTION)
    assert streamer.events[-1] == ("end", None)
    written, draft, num_drafts = [], None, 0
    for kind, tokens in streamer.events[1:-1]:
        if kind == "put":
            assert draft is None or list(itertools.takewhile(lambda token: token != END, draft)) == tokens
            written, draft = written + tokens, None
        else:
            assert len(tokens) in sizes
            if draft is not None:  # a step reveals something and takes nothing back
                assert tokens.count(MASK) < draft.count(MASK)
                assert all(new == old for new, old in zip(tokens, draft, strict=True) if old not in (MASK, END))
            draft, num_drafts = tokens, num_drafts + 1
    assert num_drafts == int(output.num_forward_passes)
    assert written == [PLAN, *tokens_of(output.plan[0]), EXECUTION, *tokens_of(output.execution[0])]
    plain = generate_one(model, QUESTION, **settings)
    assert torch.equal(output.sequences, plain.sequences)


@pytest.mark.parametrize("streamer_class", [TextDiffusionStreamer, TextStreamer])
def test_the_streamers_of_transformers_print_the_answer(streamer_class, capsys):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    model = HierBD3LMForBlockDiffusion(config).eval()
    question = tokenizer("What? ", return_tensors="pt").input_ids
    output = model.generate(question, streamer=streamer_class(tokenizer), max_plan_len=8, max_execution_len=8)
    printed = capsys.readouterr().out
    answer = output.sequences[0][output.sequences[0] != config.end_token_id]
    if streamer_class is TextStreamer:
        assert printed.strip("\n") == tokenizer.decode(answer).strip("\n")
    else:
        assert printed.startswith("What? ")
        assert printed.count("\033[33m") == int(output.num_forward_passes)  # a draft in yellow for every pass


def test_a_streamer_for_two_rows_is_refused():
    with pytest.raises(ValueError, match="`streamer` must be None for more than one row, but got 2 rows"):
        speaker().generate(torch.tensor([QUESTION] * 2), streamer=RecordingStreamer())


def lines_of(tokens, openers, tokenizer):
    """The text of each segment that has one, on lines of their own."""
    segments = [[]]
    for token in tokens:
        if token in openers:
            segments.append([])
        segments[-1].append(token)
    return "\n".join(filter(None, (tokenizer.decode(ids, skip_special_tokens=True) for ids in segments)))


@pytest.mark.parametrize("algorithm", ["hier", "bd3lm", "mdlm", "ar"])
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_segments_that_are_streamed_without_special_tokens_are_on_lines_of_their_own(algorithm, skip_prompt):
    tokenizer = make_tokenizer()
    block_size = {} if algorithm in ("hier", "bd3lm") else {"block_size": None}
    config = make_config_for(tokenizer, algorithm=algorithm, plan_len=8, execution_len=8, **block_size)
    torch.manual_seed(0)
    model = HierBD3LMForBlockDiffusion(config).eval()
    question = tokenizer("What?", return_tensors="pt").input_ids
    openers = (config.plan_token_id, config.execution_token_id)
    for seed in range(3):
        settings, recorded = {"temperature": 1.0, "seed": seed}, RecordingStreamer()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt, skip_special_tokens=True, timeout=5)
        output = model.generate(question, streamer=streamer, **settings)
        model.generate(question, streamer=recorded, **settings)
        tokens = [token for kind, ids in recorded.events[skip_prompt:] if kind == "put" for token in ids]
        assert tokens[0 if skip_prompt else question.shape[1]] == config.plan_token_id
        text = "".join(streamer)
        assert text == lines_of(tokens, openers, tokenizer)
        if algorithm == "hier":
            parts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (output.plan[0], output.execution[0])]
            assert text == "\n".join(filter(None, [*([] if skip_prompt else ["What?"]), *parts]))


@pytest.mark.parametrize("plan", ["3 + 4", "3 + 4\n"])
@pytest.mark.parametrize("is_one_block", [True, False])
def test_there_is_one_line_break_between_plan_and_execution(plan, is_one_block):
    tokenizer, order = make_tokenizer(), make_model().order
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[role]) for role in ("plan", "execution")}
    order = replace(order, **ids)
    pieces, streamer = [], TextStreamer(tokenizer, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    texts = {"plan": plan, "execution": "is 7"}
    blocks = [[ids[f"{role}_token_id"], *tokenizer(text)["input_ids"]] for role, text in texts.items()]
    for block in [blocks[0] + blocks[1]] if is_one_block else blocks:
        stream(streamer, torch.tensor(block), order)
    streamer.end()
    assert "".join(pieces) == "3 + 4\nis 7"


# Several rows


class RowStreamer(BaseStreamer):
    """Records what each row has written after each pass, and stops a row after so many passes."""

    def __init__(self, stops=()):
        self.stops, self.tokens, self.active = dict(stops), [], []

    def put(self, value):
        """Finished blocks of all rows, mixed: not what this one is for."""

    def put_rows(self, answer, active):
        self.tokens.append([tokens_of(row) for row in answer.tokens])
        self.active.append(active)
        return [row for row, passes in self.stops.items() if len(self.active) == passes]

    def end(self):
        self.active.append("end")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("algorithm", ["hier", "ar"])
def test_several_rows_are_followed_to_their_ends(sampler, algorithm):
    sizes = (4, 6) if algorithm == "hier" else (None, None)
    model = speaker(*sizes, algorithm=algorithm)
    question, streamer = left_pad(RAGGED_QUESTIONS), RowStreamer()
    settings = {"sampler": sampler, **SAMPLERS[sampler]}
    output = model.generate(question, streamer=streamer, **settings)
    assert streamer.active[-2:] == [[], "end"]
    for earlier, later in itertools.pairwise(streamer.tokens):
        assert all(new[: len(old)] == old for old, new in zip(earlier, later, strict=True))
    assert streamer.tokens[-1] == [tokens_of(row) for row in output.sequences[:, question.shape[1] :]]
    if algorithm == "hier":
        ends = [sum(row in active for active in streamer.active[:-1]) + 1 for row in range(len(question))]
        assert ends == output.num_forward_passes.tolist() and len(set(ends)) > 1


@pytest.mark.parametrize("algorithm", ["hier", "ar"])
def test_rows_that_are_stopped_cost_nothing_more_and_change_no_other_row(algorithm):
    sizes = (4, 6) if algorithm == "hier" else (None, None)
    model, question = speaker(*sizes, end_bias=-9.0, algorithm=algorithm), left_pad(RAGGED_QUESTIONS)
    whole = model.generate(question)
    output = model.generate(question, streamer=RowStreamer({0: 2, 3: 4}))
    others = [1, 2, 4, 5, 6]
    assert torch.equal(output.sequences[others], whole.sequences[others])
    assert torch.equal(output.num_forward_passes[others], whole.num_forward_passes[others])
    assert output.finished.tolist() == whole.finished.tolist()
    if algorithm == "hier":
        assert output.num_forward_passes[[0, 3]].tolist() == [2, 4]
        assert len(tokens_of(output.sequences[0])) < len(tokens_of(whole.sequences[0]))


@pytest.mark.parametrize("algorithm", ["hier", "ar"])
def test_a_call_ends_when_all_rows_are_stopped(algorithm):
    sizes = (4, 6) if algorithm == "hier" else (None, None)
    model, question = speaker(*sizes, end_bias=-9.0, algorithm=algorithm), left_pad(RAGGED_QUESTIONS)
    streamer = RowStreamer(dict.fromkeys(range(len(question)), 3))
    model.generate(question, streamer=streamer)
    assert len(streamer.active) <= 5 and streamer.active[-1] == "end"
