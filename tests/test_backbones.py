"""A backbone is probed when a model is made, and the table of backbones says what the probes say."""

import pytest
import torch

from hierbd3lm.backbones_hierbd3lm import check_backbone
from hierbd3lm.benchmarks.backbones import PAGE, WORKS, page, table, try_type
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_config
from .tiny_backbones import make_backbone_config, model_with

VERDICTS = {
    "opt": WORKS,
    "gemma4_text": WORKS,
    "gpt_oss": WORKS,
    "deepseek_v3": WORKS,
    "electra": "head with layers of its own",
    "gpt_neo": "stays causal inside a block, whatever mask it is given",
    "bloom": "takes no `position_ids`",
    "xlm": "takes no `past_key_values`",
    "mamba": "layers of linear_attention",
    "qwen3_5": "multimodal, its text part is qwen3_5_text",
}


@pytest.mark.parametrize("model_type", VERDICTS)
def test_a_type_works_or_is_refused_alike_from_scratch_and_converted(model_type):
    assert try_type(model_type) == VERDICTS[model_type]
    name = f"`{model_type}`"
    row = f"{name}" if VERDICTS[model_type] == WORKS else f"| {name} | {VERDICTS[model_type]} |"
    assert row in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_of_backbones_is_true():
    assert page(list(table())) == PAGE.read_text(encoding="utf-8")


def test_a_probe_draws_no_random_numbers(monkeypatch):
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append((HierBD3LMForBlockDiffusion(make_config()).get_input_embeddings().weight, torch.rand(4)))
        monkeypatch.setattr("hierbd3lm.modeling_hierbd3lm.check_backbone", lambda model: None)
    torch.testing.assert_close(*drawn, rtol=0, atol=0)


@pytest.mark.parametrize("initializer_range", [0.0, 1e-6, 1.0])
def test_weights_that_say_little_are_no_reason_to_refuse(initializer_range):
    config = make_backbone_config("qwen3", initializer_range=initializer_range)
    assert model_with(config).backbone.config.initializer_range == initializer_range


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


@pytest.mark.parametrize("backbone", ["llama", "gemma3"])
def test_sequences_that_are_too_long_for_one_set_of_longrope_factors_are_refused(backbone):
    rope = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = make_backbone_config(backbone, rope_parameters=rope if backbone == "gemma3" else LONGROPE)
    assert model_with(config).config.sequence_len == 64
    message = "must be at most original_max_position_embeddings 64 of a backbone with LongRoPE, .* but got 65"
    with pytest.raises(ValueError, match=message):
        model_with(config, question_len=17)


def broken_body(model, breaks):
    """Wrap the forward of the backbone's body; `breaks` changes its arguments."""
    body = model.backbone.base_model
    forward = body.forward

    def wrapped(input_ids, **kwargs):
        return forward(input_ids=input_ids, **breaks(input_ids, kwargs))

    body.forward = wrapped
    return model


BREAKS = {
    "does not obey the mask": lambda ids, kwargs: (
        kwargs | {"attention_mask": None if kwargs.get("attention_mask") is None else kwargs["attention_mask"] | True}
    ),
    "does not obey position_ids": lambda ids, kwargs: (
        kwargs | {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    ),
    "stays causal inside a block": lambda ids, kwargs: (
        kwargs
        | {
            "attention_mask": kwargs["attention_mask"] & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
            if kwargs.get("attention_mask") is not None and kwargs.get("past_key_values") is None
            else kwargs.get("attention_mask")
        }
    ),
    "does not read finished blocks from the cache": lambda ids, kwargs: (
        kwargs
        | {
            "attention_mask": kwargs["attention_mask"] & (torch.arange(kwargs["attention_mask"].shape[-1]) < 3)
            if kwargs.get("past_key_values") is not None
            else kwargs.get("attention_mask")
        }
    ),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_each_fault_is_named(reason):
    model = broken_body(model_with("qwen3"), BREAKS[reason])
    with pytest.raises(ValueError, match=f"`backbone_config`: Qwen3ForCausalLM {reason}"):
        check_backbone(model)


def test_an_error_of_the_backbone_is_named_with_its_cause():
    def fail(ids, kwargs):
        raise AttributeError("no attribute 'secret'")

    with pytest.raises(
        ValueError, match="does not run under the mask: AttributeError: no attribute 'secret'"
    ) as error:
        check_backbone(broken_body(model_with("qwen3"), fail))
    assert isinstance(error.value.__cause__, AttributeError)


def test_the_probe_leaves_the_mode_of_the_model():
    for training in (True, False):
        model = model_with("gpt2").train(training)
        check_backbone(model)
        assert model.training is training
