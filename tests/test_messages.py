"""From chat messages to `generate` and back."""

import pytest
import torch
from transformers import pipeline

from hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.data.messages import CHAT_TEMPLATE, answer_messages, parse_answer
from hierbd3lm.data.tokenization import train_tokenizer

from .tiny_tokenizer import make_config_for, make_tokenizer

CHAT = [{"role": "user", "content": "2 + 3?"}]
ANSWER = {"role": "assistant", "reasoning_content": "Add.\nTell.", "content": "2 + 3 = 5\n#### 5"}


@pytest.fixture(scope="module")
def chat():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return HierBD3LMForBlockDiffusion(make_config_for(tokenizer)).eval(), tokenizer


def test_a_plan_is_rendered_as_reasoning_content_in_the_layout_of_a_sequence(chat):
    _, tokenizer = chat
    text = tokenizer.apply_chat_template([*CHAT, ANSWER], tokenize=False)
    assert text == "2 + 3?<|plan|>Add.\nTell.<|end|><|execution|>2 + 3 = 5\n#### 5<|end|>"
    assert parse_answer(text) == ANSWER
    without_plan = {"role": "assistant", "content": "5"}
    assert tokenizer.apply_chat_template([*CHAT, without_plan], tokenize=False) == "2 + 3?<|execution|>5<|end|>"


def test_messages_are_generated_and_parsed_back(chat):
    model, tokenizer = chat
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokenizer("2 + 3?", return_tensors="pt")["input_ids"].tolist()
    output = model.generate(**inputs)
    (message,) = answer_messages(output, tokenizer)
    assert message == parse_answer(tokenizer.decode(output.sequences[0]))
    assert message["reasoning_content"] == tokenizer.decode(output.plan[0], skip_special_tokens=True) != ""
    again = tokenizer.apply_chat_template([*CHAT, message], tokenize=False)
    assert parse_answer(again) == message


@pytest.mark.parametrize(
    ("text", "plan", "execution"),
    [
        ("<|plan|>a<|end|><|execution|>b<|end|><|end|><|pad|>", "a", "b"),
        ("question <|plan|>a<|execution|>b", "a", "b"),
        ("<|plan|>cut o", "cut o", ""),
        ("<|execution|>b<|end|>", "", "b"),
        ("<|plan|><|end|><|execution|>", "", ""),
    ],
)
def test_answers_that_were_cut_off_are_parsed_as_far_as_they_go(text, plan, execution):
    message = parse_answer(text)
    assert (message["reasoning_content"], message["content"]) == (plan, execution)


def test_a_text_without_special_tokens_is_no_answer():
    with pytest.raises(ValueError, match=r"`text` must contain <\|plan\|> or .*skip_special_tokens=False"):
        parse_answer("Add. 5")


def test_a_tokenizer_that_is_trained_has_the_template():
    tokenizer = train_tokenizer(["2 + 3? Add. 5"])
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_pipeline_takes_chats(chat, tmp_path):
    model, tokenizer = chat
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    (record,) = pipe(CHAT)
    assert record["generated_text"][:1] == CHAT and record["generated_text"][1]["role"] == "assistant"
    expected = pipe("2 + 3?", return_full_text=False)[0]["generated_text"]
    assert record["generated_text"][1]["content"] == expected != ""
