"""Streamers receive the prompt, drafts and finished blocks."""

import itertools

import pytest
import torch
from transformers.generation.streamers import TextDiffusionStreamer, TextStreamer

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_generation import END, EXECUTION, MASK, PLAN, QUESTION, SAMPLERS, generate_one, speaker, tokens_of
from .tiny_tokenizer import make_config_for, make_tokenizer

# Streaming


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
