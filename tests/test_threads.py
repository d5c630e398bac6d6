"""Several threads may use one model at the same time: nothing of a call is kept in the model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from .tiny import make_batch, make_model
from .tiny_backbones import BACKBONES, make_backbone_config

NUM_THREADS, NUM_CALLS = 4, 12


def in_threads(call):
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(call, range(NUM_CALLS)))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_threads_generate_what_one_after_the_other_generates(backbone):
    model = make_model(backbone_config=make_backbone_config(backbone), attn_implementation="eager")
    questions = torch.randint(5, 40, (NUM_CALLS, 2, 6), generator=torch.Generator().manual_seed(0))

    def generate(number):
        sampler = ("confidence", "first_hitting", "entropy")[number % 3]
        return model.generate(questions[number], sampler=sampler, temperature=0.5 * (number % 2), seed=number)

    alone = [generate(number) for number in range(NUM_CALLS)]
    for one, other in zip(alone, in_threads(generate), strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(one.num_forward_passes, other.num_forward_passes)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_threads_measure_what_one_after_the_other_measures(backbone):
    model = make_model(backbone_config=make_backbone_config(backbone), attn_implementation="eager")
    batch = make_batch([(5, 2, 2), (3, 1, 3)], model.config)
    predicted = model.order.predicted(**batch)

    @torch.no_grad()
    def measure(number):
        masked = predicted & (torch.arange(predicted.shape[1]) % (number + 2) != 0)
        return model.masked_nll(masked, **batch)

    alone = [measure(number) for number in range(NUM_CALLS)]
    for one, other in zip(alone, in_threads(measure), strict=True):
        assert torch.equal(one, other)


def test_a_failure_in_generation_ends_the_stream():
    """The consumer of an iterating streamer waits until it is ended."""

    class Recorder(BaseStreamer):
        ended = False

        def put(self, value):
            if value.shape[-1] != 5:
                raise RuntimeError("lost connection")

        def end(self):
            self.ended = True

    streamer = Recorder()
    with pytest.raises(RuntimeError, match="lost connection"):
        make_model().generate(torch.tensor([[5, 6, 7, 8, 9]]), streamer=streamer)
    assert streamer.ended
