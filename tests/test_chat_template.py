"""Questions go through a tokenizer's chat template everywhere, or nowhere."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hierbd3lm import train
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import HierarchicalDataCollator, encode_example
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.questions import encode_question, render_question
from hierbd3lm.evaluation.arguments import EvaluationArguments
from hierbd3lm.evaluation.prompts import encode_prompt
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.lora import load_checkpoint, load_tokenizer
from hierbd3lm.training.preparation import make_model
from hierbd3lm.training.settings import ModelArguments

from .tiny_tokenizer import BOS, make_config_for, make_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROW = {"question": "2 + 3?", "plan": "Add.", "execution": "5\n#### 5"}
RENDERED = f"{BOS}[user]2 + 3?\n[assistant]"
LENGTHS = {"question_len": 64, "plan_len": 24, "execution_len": 24, "block_size": 4}


def make_chat_tokenizer(template=TEMPLATE):
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_chat_tokenizer()


def save_autoregressive(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# Rendering


def test_question_is_a_user_turn_with_the_generation_prompt_and_no_doubled_token(tokenizer):
    assert render_question("2 + 3?", tokenizer) == RENDERED
    ids = encode_question("2 + 3?", tokenizer, chat_template=True)
    assert tokenizer.decode(ids) == RENDERED
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "2 + 3?"}], add_generation_prompt=True, return_dict=False
        )
    )
    assert encode_question("2 + 3?", tokenizer, chat_template=False) == tokenizer("2 + 3?")["input_ids"]


def test_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="`chat_template` must be False for a tokenizer without a chat template"):
        encode_question("2 + 3?", make_tokenizer(), chat_template=True)


def test_template_that_states_the_date_renders_the_same_on_every_day():
    template = "\n{%- set today = strftime_now('%d %B %Y') %}{% for message in messages %}{{ today }} {% endfor %}"
    tokenizer = make_chat_tokenizer("\n{% if strftime_now is defined %}yes {% endif %}" + template)
    assert render_question("What day?", tokenizer) == "\nyes 01 January 2026 "


# One rendering for all


@pytest.mark.parametrize("chat_template", [True, False])
def test_training_evaluation_and_collator_encode_the_same_question(tokenizer, chat_template):
    from datasets import Dataset

    config = make_config_for(tokenizer, **LENGTHS, chat_template=chat_template)
    expected = tokenizer(RENDERED if chat_template else ROW["question"], add_special_tokens=not chat_template)
    expected = expected["input_ids"]
    prepared = prepare_dataset(Dataset.from_list([ROW]), tokenizer, config)[0][0]
    prompt = encode_prompt(0, ROW["question"], ROW["plan"], tokenizer, config)
    batch = HierarchicalDataCollator(config, tokenizer)([ROW])
    assert prepared["question_ids"] == prompt.question_ids == expected
    assert batch["input_ids"][batch["segment_ids"] == 0].tolist() == expected
    plain = encode_example(ROW, tokenizer)
    for ids in (prepared, vars(prompt)):
        assert ids["plan_ids"] == plain["plan_ids"]  # the template is for questions alone
    assert prepared["execution_ids"] == plain["execution_ids"]


def test_layout_tokens_in_a_rendered_question_are_still_found(tokenizer):
    config = make_config_for(tokenizer, **LENGTHS, chat_template=True)
    assert encode_prompt(0, "a <|plan|> b", None, tokenizer, config).has_special_token


def test_rendered_question_counts_towards_its_limit(tokenizer):
    fields = LENGTHS | {"question_len": len(encode_question(ROW["question"], tokenizer, chat_template=True))}
    for missing in (0, 1):
        fields["question_len"] -= missing
        config = make_config_for(tokenizer, **fields, chat_template=True)
        assert encode_prompt(0, ROW["question"], None, tokenizer, config).too_long == ["question"] * missing


# The choice


def test_conversion_takes_the_template_that_there_is(tmp_path, tokenizer):
    for name, of in (("chat", tokenizer), ("plain", make_tokenizer())):
        path = save_autoregressive(tmp_path / name, of)
        model = HierBD3LMForBlockDiffusion.from_autoregressive(path, of, **LENGTHS)
        assert model.config.chat_template == (name == "chat")
        model.save_pretrained(tmp_path / "own")
        assert HierBD3LMConfig.from_pretrained(tmp_path / "own").chat_template == (name == "chat")


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", True), ("true", True), (True, True), ("false", False), (False, False)]
)
def test_choice_overrides_the_conversion_and_is_kept_by_later_runs(tmp_path, tokenizer, choice, expected):
    path = save_autoregressive(tmp_path / "ar", tokenizer)
    arguments = ModelArguments(init_from=path, chat_template=choice, **LENGTHS)
    model = make_model(arguments, tokenizer)
    assert model.config.chat_template == expected
    model.save_pretrained(tmp_path / "own")
    assert (
        load_checkpoint(str(tmp_path / "own"), tokenizer, ModelArguments().config_fields()).config.chat_template
        == expected
    )


def test_model_from_scratch_has_no_template_unless_told_to(tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    for choice, expected in (("auto", False), ("true", True)):
        arguments = ModelArguments(backbone=sizes, chat_template=choice, **LENGTHS)
        assert make_model(arguments, tokenizer).config.chat_template == expected


@pytest.mark.parametrize("fields", [{}, {"algorithm": "ar"}, {"plan_len": 0}])
def test_field_of_the_configuration_is_true_or_false(fields):
    for value in (True, False):
        assert HierBD3LMConfig(chat_template=value, **fields).chat_template is value
    for value in ("false", None, 1):
        with pytest.raises(ValueError, match=f"`chat_template` must be True or False, but got {value!r}"):
            HierBD3LMConfig(chat_template=value, **fields)


def test_other_choice_is_refused():
    with pytest.raises(ValueError, match="`chat_template` must be one of true, false, auto, but got 'yes'"):
        ModelArguments(chat_template="yes")


def test_run_is_evaluated_as_it_was_trained(tmp_path, tokenizer, monkeypatch):
    path = save_autoregressive(tmp_path / "ar", tokenizer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(ROW | {"question": f"{i} + 3?"}) + "\n" for i in range(4)))
    settings = {"init_from": path, "dataset": rows, "output_dir": tmp_path / "run", "num_validation_examples": 1}
    settings |= LENGTHS | {"max_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none"}
    train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    asked = []
    generate = HierBD3LMForBlockDiffusion.generate

    def recording(model, input_ids, attention_mask, **kwargs):
        asked.extend(
            load_tokenizer(str(tmp_path / "run")).batch_decode(
                [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
            )
        )
        return generate(model, input_ids, attention_mask, **kwargs)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", recording)
    evaluate(EvaluationArguments(model=str(tmp_path / "run"), split="validation", device="cpu"))
    assert asked == [f"{BOS}[user]3 + 3?\n[assistant]"]
    assert AutoTokenizer.from_pretrained(path).chat_template == TEMPLATE
