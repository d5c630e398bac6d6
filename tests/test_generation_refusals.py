"""Inputs and settings of generation that are refused, and settings that are saved and read."""

import json
import math

import pytest
import torch
from transformers import GenerationConfig

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .tiny import make_model
from .tiny_generation import END, EXECUTION, GIVEN_PLAN, MASK, PAD, PLAN, QUESTION, generate_one, speaker

# What is refused


@pytest.mark.parametrize(
    ("plan_ids", "message"),
    [
        ([[PAD, 7, 8], [7, 8, 9]], "`plan_ids` must be padded on the right"),
        ([[7, END, 8], [7, 8, 9]], "`plan_ids` must be padded on the right"),
        ([list(range(5, 17))] * 2, "`plan_ids` must have at most plan_len - 1 = 11 tokens, but got 12"),
        ([[7, MASK, 8], [7, 8, 9]], "content of the plan only, but got the mask token"),
        ([[7, PLAN, 8], [7, 8, 9]], "content of the plan only, but got the plan token"),
        ([[7, EXECUTION, 8], [7, 8, 9]], "content of the plan only, but got the execution token"),
        ([[7, 8, 9]], "`plan_ids` must be .* batch 2"),
        ([7, 8, 9], "`plan_ids` must be .* batch 2"),
        (None, "`plan_ids` must be given for stage='execution'.*without plan_ids"),
    ],
)
def test_a_plan_that_cannot_be_used_verbatim_is_refused(plan_ids, message):
    plan_ids = None if plan_ids is None else torch.tensor(plan_ids)
    with pytest.raises(ValueError, match=message):
        speaker().generate(torch.tensor([QUESTION] * 2), plan_ids=plan_ids, stage="execution")


@pytest.mark.parametrize("stage", ["full", "plan"])
def test_a_plan_is_refused_where_one_is_denoised(stage):
    with pytest.raises(ValueError, match=f"stage='{stage}' with plan_ids"):
        generate_one(speaker(), QUESTION, GIVEN_PLAN, stage=stage)


def test_a_question_over_its_length_is_refused():
    model = speaker()
    longest = torch.full((1, 12), 7)
    model.generate(torch.nn.functional.pad(longest, (5, 0)), stage="plan")  # padding is not counted
    with pytest.raises(ValueError, match="`input_ids` must have at most question_len=12 tokens, but got 13"):
        model.generate(torch.full((1, 13), 7))


def test_an_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`input_ids` and `attention_mask` must have one shape.*\(1, 5\).*\(1, 4\)"):
        speaker().generate(torch.tensor([QUESTION]), attention_mask=torch.ones(1, 4))


def test_another_class_of_generation_config_is_refused():
    with pytest.raises(ValueError, match="`generation_config` must be a HierBD3LMGenerationConfig, but GenerationC"):
        generate_one(speaker(), QUESTION, generation_config=GenerationConfig())


@pytest.mark.parametrize("name", ["beams", "tresh"])
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(ValueError, match=f"`generation_config` has no setting {name}; it has stage, sampler"):
        HierBD3LMGenerationConfig(**{name: 3})
    with pytest.raises(ValueError, match=f"`generation_config` has no setting {name}; it has stage, sampler"):
        generate_one(speaker(), QUESTION, **{name: 3})


@pytest.mark.parametrize(
    ("name", "values", "accepted"),
    [
        ("stage", ["both", None], "one of full, plan, execution"),
        ("sampler", ["greedy", 1], "one of first_hitting, ancestral, confidence, entropy"),
        ("num_steps", [0, -1, 2.5, "3", True, None], "an integer >= 1"),
        ("tokens_per_step", [0, 1.0, None], "an integer >= 1"),
        ("threshold", [0, -0.1, 1.01, math.nan, "0.9", None], r"a number in \(0, 1\]"),
        ("top_p", [0.0, 1.5, math.nan, None], r"a number in \(0, 1\]"),
        ("entropy_bound", [-0.1, math.nan, None], "a number >= 0"),
        ("temperature", [-1, math.nan, math.inf, None, True], "number >= 0"),
        ("left_to_right", [1, None, "yes"], "True or False"),
        ("fill_after_end", [1, None, "yes"], "True or False"),
        ("seed", [-1, 1.0, "1"], "an integer >= 0 or None"),
        ("max_plan_len", [-1, 1.0], "an integer >= 0 or None"),
        ("max_execution_len", [-4, 4.0], "an integer >= 0 or None"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name, values, accepted):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be (a finite )?{accepted}"):
            HierBD3LMGenerationConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 3, 6, 16])
@pytest.mark.parametrize("name", ["max_plan_len", "max_execution_len"])
def test_a_limit_that_cuts_a_block_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a multiple of the block size 4 up to 12, but got {value}"):
        generate_one(speaker(4, 4), QUESTION, **{name: value})


@pytest.mark.parametrize("stage", ["full", "plan"])
def test_a_limit_that_leaves_nothing_to_denoise_is_refused(stage):
    with pytest.raises(ValueError, match=r"`max_plan_len` must be .*but got 1"):
        generate_one(speaker(1, 1), QUESTION, stage=stage, max_plan_len=1)


# Settings


SAVED = {
    "stage": "plan",
    "sampler": "entropy",
    "num_steps": 5,
    "threshold": 0.25,
    "entropy_bound": 0.75,
    "tokens_per_step": 2,
    "left_to_right": True,
    "temperature": 1.0,
    "top_p": 0.5,
    "fill_after_end": False,
    "max_plan_len": 8,
    "max_execution_len": 4,
    "seed": 11,
}


def test_settings_travel_with_the_model(tmp_path):
    model = make_model()
    for name, value in SAVED.items():
        setattr(model.generation_config, name, value)
    expected = generate_one(model, QUESTION)
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is HierBD3LMGenerationConfig
    assert {name: getattr(loaded.generation_config, name) for name in SAVED} == SAVED
    assert torch.equal(generate_one(loaded, QUESTION).sequences, expected.sequences)
    assert SAVED.keys() <= json.loads((tmp_path / "generation_config.json").read_text()).keys()


def test_a_model_without_saved_settings_has_the_defaults(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    default = HierBD3LMGenerationConfig()
    assert type(loaded.generation_config) is HierBD3LMGenerationConfig
    assert {name: getattr(loaded.generation_config, name) for name in SAVED} == {
        name: getattr(default, name) for name in SAVED
    }


def test_settings_may_be_given_to_from_pretrained(tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = HierBD3LMGenerationConfig(threshold=0.125)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path, generation_config=settings)
    assert loaded.generation_config.threshold == 0.125


def test_keyword_arguments_override_the_config_and_change_neither():
    model = make_model()
    model.generation_config.stage = "plan"
    settings = HierBD3LMGenerationConfig(sampler="first_hitting", max_plan_len=4, max_execution_len=4)
    by_model, by_config = generate_one(model, QUESTION), generate_one(model, QUESTION, generation_config=settings)
    assert by_model.execution.shape[1] == 0 < by_config.execution.shape[1]
    both = generate_one(model, QUESTION, generation_config=settings, stage="plan", temperature=0.5)
    assert both.sequences.shape == (1, 5 + 4)
    assert (settings.stage, settings.temperature, model.generation_config.sampler) == ("full", 0.0, "confidence")
