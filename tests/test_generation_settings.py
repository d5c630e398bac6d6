"""Generation settings refuse what they do not know, wherever it is set, and a saved checkpoint always loads."""

import copy
import json
import pickle

import pytest

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig, settings_of

from .tiny import make_model

REFUSED = {
    "max_new_tokens": (0, "`max_new_tokens` must be an integer >= 1 or None, but got 0"),
    "max_length": (64, "`max_length` does not apply to block diffusion: `max_new_tokens`"),
    "do_sample": (True, "`do_sample` does not apply to block diffusion: `temperature`"),
    "treshold": (0.5, "has no setting treshold; .*; did you mean `threshold`"),
    "temperature": (-1, "`temperature` must be a finite number >= 0, but got -1"),
    "sampler": ("beam", "`sampler` must be one of first_hitting, .*, but got 'beam'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_attribute_that_is_no_setting_or_out_of_range_is_refused(name, tmp_path):
    value, message = REFUSED[name]
    model = make_model()
    before = settings_of(model.generation_config)
    with pytest.raises(ValueError, match=message):
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        HierBD3LMGenerationConfig(**{name: value})
    assert settings_of(model.generation_config) == before
    model.save_pretrained(tmp_path)
    assert settings_of(HierBD3LMForBlockDiffusion.from_pretrained(tmp_path).generation_config) == before


def test_settings_that_are_set_as_attributes_are_saved(tmp_path):
    model = make_model()
    model.generation_config.threshold = 0.5
    model.generation_config.max_plan_len = 8
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path).generation_config
    assert (loaded.threshold, loaded.max_plan_len) == (0.5, 8)


def test_a_checkpoint_with_foreign_settings_is_loaded_without_them(tmp_path, capture_warnings):
    model = make_model()
    model.generation_config.threshold = 0.5
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 64, "of_a_later_version": 1}))
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert settings_of(loaded.generation_config) == settings_of(model.generation_config)
    assert ["top_k, of_a_later_version" in line for line in capture_warnings] == [True]


def test_settings_can_be_copied_and_pickled():
    settings = HierBD3LMGenerationConfig(threshold=0.5, seed=3)
    for other in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert settings_of(other) == settings_of(settings)


@pytest.mark.parametrize("value", [2**63, 10**400])
@pytest.mark.parametrize(
    "name", ["num_steps", "tokens_per_step", "block_size", "max_plan_len", "max_new_tokens", "temperature", "seed"]
)
def test_integers_that_no_tensor_can_hold_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*below 2\*\*63"):
        HierBD3LMGenerationConfig(**{name: value})
