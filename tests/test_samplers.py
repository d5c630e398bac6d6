"""Samplers as objects: those of the table read their own settings, and a user's own one is passed to `generate`."""

from dataclasses import dataclass, fields

import pytest
import torch

from hierbd3lm.samplers_hierbd3lm import SAMPLERS, Confidence, Sampler, make_sampler, rank, spread
from hierbd3lm.settings_hierbd3lm import SAMPLERS as SAMPLER_NAMES
from hierbd3lm.settings_hierbd3lm import SAMPLERS_OF, SETTINGS, HierBD3LMGenerationConfig

from .tiny import make_model

QUESTIONS = torch.tensor([[0, 0, 7, 8, 9], [11, 5, 6, 7, 30]])


@dataclass(frozen=True)
class TopK(Sampler):
    """The example of the documentation."""

    k: int = 2

    def accept(self, candidates, logits, tokens):
        confidence = spread(logits.softmax(dim=-1).amax(dim=-1), candidates, fill=-1.0)
        return candidates & (rank(-confidence) < self.k)


def test_table_and_settings_name_the_same_samplers():
    assert tuple(SAMPLERS) == SAMPLER_NAMES


def test_settings_know_which_samplers_read_them():
    read = {
        name: tuple(sampler for sampler in SAMPLERS if name in names_of(SAMPLERS[sampler])) for name in SAMPLERS_OF
    }
    assert read == SAMPLERS_OF
    assert {name for sampler in SAMPLERS.values() for name in names_of(sampler)} == set(SAMPLERS_OF)


def names_of(sampler):
    return [item.name for item in fields(sampler)]


@pytest.mark.parametrize(
    ("sampler", "setting"),
    [
        ("first_hitting", {"left_to_right": True}),
        ("confidence", {"num_steps": 4}),
        ("confidence", {"entropy_bound": 1.0}),
        ("ancestral", {"threshold": 0.5}),
        ("entropy", {"threshold": 0.5}),
    ],
)
def test_a_setting_without_effect_is_refused(model, sampler, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"`{name}` has no effect with sampler='{sampler}'"):
        model.generate(QUESTIONS, sampler=sampler, **setting)
    with pytest.raises(ValueError, match=f"`{name}` has no effect with a sampler of your own"):
        model.generate(QUESTIONS, sampler=TopK(), **setting)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_field_of_a_sampler_is_a_setting_and_arrives_in_it(name):
    settings = HierBD3LMGenerationConfig(
        sampler=name, num_steps=3, threshold=0.7, entropy_bound=0.5, tokens_per_step=2, left_to_right=True
    )
    sampler = make_sampler(settings)
    names = [item.name for item in fields(sampler)]
    assert set(names) <= set(SETTINGS)
    assert all(getattr(sampler, field) == getattr(settings, field) for field in names)


def test_a_sampler_object_gives_what_its_name_and_settings_give(model):
    by_name = model.generate(QUESTIONS, sampler="confidence", threshold=0.3)
    by_object = model.generate(QUESTIONS, sampler=Confidence(threshold=0.3))
    assert torch.equal(by_name.sequences, by_object.sequences)
    assert torch.equal(by_name.num_forward_passes, by_object.num_forward_passes)


def test_a_sampler_of_the_user_decides_how_many_tokens_a_pass_reveals():
    model = make_model(block_size=8, plan_len=8, execution_len=8)
    output = {k: model.generate(QUESTIONS[1:], sampler=TopK(k=k), fill_after_end=False) for k in (1, 3, 7)}
    # two blocks of an opener and seven tokens
    assert {k: int(one.num_forward_passes) for k, one in output.items()} == {1: 14, 3: 6, 7: 2}
