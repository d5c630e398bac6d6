"""Fixtures that every test file shares."""

import logging
import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest
import torch

import hierbd3lm.training.objectives
from hierbd3lm.diffusion_hierbd3lm import MaskDraw, draw_mask

from .tiny import make_config, make_model
from .tiny_evaluation import args, checkpoint, dataset_of, rows, script  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the cache of datasets apart for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def config():
    return make_config()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def compiler():
    """torch.compile as in a new process, for a test that has to compile something.

    Torch compiles a function only a few times in a process, and afterwards runs it eagerly.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.fixture
def capture_warnings():
    """The texts of the warnings that this package logs during a test."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger("hierbd3lm"), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def draws(monkeypatch):
    """Record all noise draws, in order, with their clip intervals."""
    record = []

    def recording_draw_mask(block_ids, maskable, clip, *others):
        draw = draw_mask(block_ids, maskable, clip, *others)
        one_copy = MaskDraw(draw.masked[:, 0], draw.weights[:, 0])
        record.append(SimpleNamespace(draw=one_copy, clip=clip, block_ids=block_ids, maskable=maskable, copies=draw))
        return draw

    monkeypatch.setattr(hierbd3lm.training.objectives, "draw_mask", recording_draw_mask)
    return record
