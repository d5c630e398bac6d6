"""The engine alone: every algorithm, and what a stream may be given."""

import queue
import random

import pytest
import torch

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.serving.engine import Closed, Delta, Done, Engine, Failed, Job, QueueFull
from hierbd3lm.serving.prompts import encode_question_or_ids
from hierbd3lm.settings_hierbd3lm import resolve_settings

from .tiny_algorithms import ALL
from .tiny_serving import SECONDS, held, wait_until
from .tiny_tokenizer import make_config_for, make_tokenizer

QUESTIONS = ["2 + 3?", "", "How many?", "é", "4"]


KINDS = ALL | {"steps that follow the plan": {"execution_order": "plan", "step_len": 4}}


def make_model(kind, length=12):
    tokenizer = make_tokenizer()
    sizes = {"question_len": 16, "plan_len": length, "execution_len": length, "block_size": 4}
    torch.manual_seed(0)
    config = make_config_for(tokenizer, **sizes | KINDS[kind])
    return HierBD3LMForBlockDiffusion(config).double().eval(), tokenizer


def submit(engine, question, streams=True, **settings):
    """The job, and the queue of what it reports."""
    events = queue.Queue()
    prompt = encode_question_or_ids(question, None, engine.tokenizer, engine.model.config)
    chosen = resolve_settings(engine.model.generation_config, settings)
    return Job(prompt, chosen, events.put, streams), events


def read(events):
    """The pieces of each segment, and the end."""
    pieces = []
    while isinstance(event := events.get(timeout=SECONDS), Delta):
        pieces.append(event)
    return pieces, event


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_streamed_to_the_answer_of_generate(kind):
    model, tokenizer = make_model(kind)
    engine = Engine(model, tokenizer, max_batch_size=8, max_queue=8)
    jobs, events = zip(*(submit(engine, question) for question in QUESTIONS), strict=True)
    engine.submit(jobs)
    for question, reports in zip(QUESTIONS, events, strict=True):
        pieces, end = read(reports)
        ids = torch.tensor([tokenizer(question)["input_ids"]], dtype=torch.long)
        output = model.generate(ids, tokenizer=tokenizer)
        texts = {
            segment: tokenizer.decode(getattr(output, segment)[0], skip_special_tokens=True)
            for segment in ("plan", "execution")
        }
        for segment, text in texts.items():
            assert "".join(piece.text for piece in pieces if piece.segment == segment) == text
            assert end.answer[segment] == text
        assert end.answer["num_forward_passes"] == int(output.num_forward_passes)
        if kind in ("hier", "bd3lm"):
            assert len(pieces) > 2
    engine.close()
    with pytest.raises(Closed):
        engine.submit(jobs)


def test_an_answer_does_not_wait_for_longer_ones_of_its_batch():
    model, tokenizer = make_model("hier")
    head = model.backbone.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features, dtype=torch.float64))
    head.bias.data[model.config.end_token_id] = 1.5  # answers of several lengths
    ids = [torch.tensor([tokenizer(question)["input_ids"]], dtype=torch.long) for question in QUESTIONS]
    passes = [int(model.generate(row).num_forward_passes) for row in ids]
    assert len(set(passes)) > 1
    engine = Engine(model, tokenizer, max_batch_size=8, max_queue=8)
    jobs, events = zip(*(submit(engine, question, streams=False) for question in QUESTIONS), strict=True)
    with held(model, passes=min(passes)) as waiting:
        engine.submit(jobs)
        wait_until(lambda: len(waiting) == min(passes) + 1)
        assert [not reports.empty() for reports in events] == [number == min(passes) for number in passes]
    assert [read(reports)[1].answer["num_forward_passes"] for reports in events] == passes
    engine.close()


def test_an_autoregressive_row_that_nobody_waits_for_ends():
    model, tokenizer = make_model("ar")
    engine = Engine(model, tokenizer, max_batch_size=8, max_queue=8)
    (job, _), steps = submit(engine, "2 + 3?"), []
    forward = model.backbone.forward

    def count(*args, **kwargs):
        steps.append(1)
        job.cancelled = len(steps) >= 3
        return forward(*args, **kwargs)

    model.backbone.forward = count
    engine.submit([job])
    engine.close()
    assert len(steps) == 3


def test_jobs_are_queued_all_or_none():
    model, tokenizer = make_model("hier")
    engine = Engine(model, tokenizer, max_batch_size=1, max_queue=3)
    with held(model):
        first, reports = submit(engine, "1")
        engine.submit([first])
        wait_until(lambda: engine.running)
        jobs = [submit(engine, str(number))[0] for number in range(4)]
        engine.submit(jobs[:2])
        with pytest.raises(QueueFull):
            engine.submit(jobs[2:])
        assert engine.num_waiting == 2
        jobs[0].cancelled = True  # makes room
        engine.submit(jobs[2:])
        assert engine.num_waiting == 3
    assert isinstance(read(reports)[1], Done)
    engine.close()
    assert [job.is_done for job in jobs] == [False, True, True, True]


@pytest.mark.slow
def test_random_jobs_that_come_go_and_fail_all_end_once():
    """Ten rounds of jobs with random settings; some are cancelled, some batches fail."""
    model, tokenizer = make_model("hier")
    engine, generator = Engine(model, tokenizer, max_batch_size=4, max_queue=1000), random.Random(0)
    encode = model.encode

    def fail_now_and_then(*args):
        if generator.random() < 0.02:
            raise RuntimeError("chance")
        return encode(*args)

    model.encode = fail_now_and_then
    submitted = []
    for _ in range(60):
        settings = {"sampler": generator.choice(["confidence", "first_hitting"])}
        settings |= {"temperature": generator.choice([0.0, 0.0, 1.0]), "seed": generator.choice([None, None, 1])}
        job, events = submit(engine, generator.choice(QUESTIONS), generator.random() < 0.5, **settings)
        engine.submit([job])
        submitted.append((job, events))
        if generator.random() < 0.2:
            generator.choice(submitted)[0].cancelled = True
    engine.close()
    ends = []
    for job, events in submitted:
        reports = list(events.queue)
        last = [event for event in reports if isinstance(event, Done | Failed)]
        assert len(last) == 1 - (job.cancelled and not job.is_done)
        assert not last or reports[-1] is last[0]
        ends += last
    assert {type(end) for end in ends} == {Done, Failed}
    assert not engine.running and engine.num_waiting == 0
