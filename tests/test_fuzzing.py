"""Arbitrary input to configuration, collator, plan parser and answer extraction: a result, or a ValueError."""

import math
from decimal import Decimal

import pytest

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.data.gsm8k import answers
from hierbd3lm.data.messages import parse_answer
from hierbd3lm.data.plans.prompt import parse_reply
from hierbd3lm.data.steps import split_steps
from hierbd3lm.settings_hierbd3lm import SETTINGS, HierBD3LMGenerationConfig

from .tiny import make_config
from .tiny_tokenizer import make_config_for, make_tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

# 2,500 cases of each in the slow set, and a few in the fast one
NUM_CASES = [25, pytest.param(2500, marks=pytest.mark.slow)]
LAYOUT = ("<|plan|>", "<|execution|>", "<|end|>", "<|mask|>", "<|pad|>", "####", "#### 18", "\n", "1. ", "[", '"')


def check(num_cases, strategy, claim):
    """Check a claim about many values of a strategy."""
    options = {"max_examples": num_cases, "deadline": None, "derandomize": True, "database": None}
    checks = list(hypothesis.HealthCheck)
    hypothesis.settings(suppress_health_check=checks, **options)(hypothesis.given(strategy)(claim))()


def scalars():
    numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**63, -(2**40)]) | st.floats() | st.booleans()
    words = st.sampled_from(["hier", "bd3lm", "mdlm", "sedd", "ar", "shifted", "causal", "loglinear", "True", ""])
    return st.none() | numbers | words | st.text(max_size=4)


def values():
    return scalars() | st.lists(scalars(), max_size=3) | st.dictionaries(st.text(max_size=3), scalars(), max_size=2)


def texts():
    return st.lists(st.text(max_size=8) | st.sampled_from(LAYOUT), max_size=8).map("".join)


@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_a_configuration_is_made_and_loaded_again_or_refused(num_cases):
    names = [name for name in HierBD3LMConfig().to_dict() if name not in ("backbone_config", "auto_map")]
    known = make_config().to_dict()

    def claim(fields):
        try:
            config = HierBD3LMConfig(**known | fields)
        except ValueError as error:
            assert str(error)
            return
        again = HierBD3LMConfig.from_dict(config.to_dict())
        assert repr(again.to_dict()) == repr(config.to_dict())  # NaN differs from itself

    ours = [name for name in names if hasattr(HierBD3LMConfig, name) or name in known]
    ours = [name for name in ours if name in HierBD3LMConfig.__dataclass_fields__ and name not in OF_TRANSFORMERS]
    check(num_cases, st.dictionaries(st.sampled_from(ours), values(), max_size=3), claim)


OF_TRANSFORMERS = {"dtype", "architectures", "id2label", "label2id", "problem_type", "output_hidden_states"}
OF_TRANSFORMERS |= {"output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"}


@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_generation_settings_are_checked_or_refused(num_cases):
    def claim(fields):
        try:
            config = HierBD3LMGenerationConfig(**fields)
        except ValueError as error:
            assert any(f"`{name}`" in str(error) for name in fields)
            return
        assert 0 < config.threshold <= 1 and config.temperature < math.inf

    check(num_cases, st.dictionaries(st.sampled_from(SETTINGS), values(), max_size=3), claim)


@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_an_example_is_collated_or_refused(num_cases):
    config = make_config()
    collators = HierarchicalDataCollator(config), HierarchicalDataCollator(config, fixed_length=True)
    ids = st.lists(st.integers(-2, 41) | scalars(), max_size=27) | scalars()
    keys = ("question_ids", "plan_ids", "execution_ids", "continues", "plan_is_given", "length")
    content = st.lists(st.integers(5, 39), max_size=24)
    examples = st.fixed_dictionaries(dict.fromkeys(keys[:3], content)) | st.dictionaries(st.sampled_from(keys), ids)

    def claim(features):
        for collator in collators:
            try:
                batch = collator(features)
            except ValueError as error:
                assert str(error)
                continue
            assert len(batch["input_ids"]) == len(features)
            real = batch["input_ids"][batch["segment_ids"] >= 0]
            assert ((real >= 0) & (real < config.vocab_size)).all() and config.mask_token_id not in real

    check(num_cases, st.lists(examples, max_size=3), claim)


@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_a_text_is_collated_or_refused(num_cases):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    collator = HierarchicalDataCollator(config, tokenizer)

    def claim(example):
        try:
            batch = collator([example])
        except ValueError as error:
            assert str(error)
            return
        segments = batch["segment_ids"][0]
        question = batch["input_ids"][0][segments == 0]
        assert tokenizer.decode(question) == example["question"]

    check(num_cases, st.fixed_dictionaries({name: texts() for name in ("question", "plan", "execution")}), claim)


@pytest.mark.parametrize("num_cases", NUM_CASES)
def test_replies_and_answers_of_any_form_are_read(num_cases):
    def claim(text):
        steps = parse_reply(text)
        assert steps is None or all(isinstance(step, str) for step in steps)
        assert all(step and "\n" not in step for step in split_steps(text))
        try:
            message = parse_answer(text)
        except ValueError:
            assert "<|plan|>" not in text and "<|execution|>" not in text
        else:
            assert message["content"] in text and message["reasoning_content"] in text
        answer = answers.extract_strict(text)
        assert answer == "[invalid]" or answer in text
        number = answers.parse_number(answer)
        assert number is None or isinstance(number, Decimal)
        assert answers.match_strict(text, text) in (True, False)
        if number is not None and answers.match_strict(text, answer):
            assert answers.match_numeric(text, answer)
        answers.match_flexible(text, text), answers.answer_is_cut(text), answers.count_votes([text, text])

    check(num_cases, texts(), claim)
