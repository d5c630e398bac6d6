"""Fixtures that every test file shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from .tiny import make_config, make_model


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def config():
    return make_config()


@pytest.fixture
def model():
    return make_model()
