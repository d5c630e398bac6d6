"""Calls that users of transformers make by habit: the pipeline, `max_new_tokens`, `do_sample`, special tokens' ids."""

import pytest
import torch
from transformers import pipeline

from hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model
from .tiny_algorithms import ALL
from .tiny_generation import END, PAD, QUESTION, speaker
from .tiny_tokenizer import make_config_for, make_tokenizer

QUESTIONS = ["Mia has 3 apples", "Leo has 4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), make_tokenizer()
    torch.manual_seed(0)
    model = HierBD3LMForBlockDiffusion(make_config_for(tokenizer)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_the_pipeline_of_a_folder_answers_as_generate_does(saved):
    folder, model, tokenizer = saved
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert "text" in repr(pipe)
    for question in QUESTIONS:
        inputs = tokenizer(question, return_tensors="pt")
        output = model.generate(**inputs)
        answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer
        (record,) = pipe(question)
        assert record["generated_text"] == question + answer
        assert record["num_forward_passes"] == int(output.num_forward_passes)
        assert pipe(question, return_full_text=False)[0]["generated_text"] == answer
        limited = pipe(question, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
        assert answer.startswith(limited)
        assert len(limited) < len(answer)
    together = pipe(QUESTIONS, batch_size=2, return_full_text=False)
    alone = [pipe(question, return_full_text=False) for question in QUESTIONS]
    assert [rows[0]["generated_text"] for rows in together] == [rows[0]["generated_text"] for rows in alone]


def test_a_saved_checkpoint_says_nothing_new_of_sampling(saved, caplog):
    folder, _, _ = saved
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(folder)
    assert not [record for record in caplog.records if "are no settings" in record.getMessage()]
    assert loaded.generation_config.max_new_tokens is None


@pytest.mark.parametrize("name", ["hier", "bd3lm", "block by block, without", "ar"])
@pytest.mark.parametrize("limit", [8, 13, 19])
def test_max_new_tokens_limits_the_answer_to_whole_blocks(name, limit):
    torch.manual_seed(0)
    sizes = {"question_len": 12, "plan_len": 12, "execution_len": 12, "block_size": 4}
    model = make_model(**(sizes | ALL[name]))
    model.backbone.lm_head.weight.data[END] = 0  # an `<|end|>` is rare
    questions = torch.tensor([[PAD, PAD, 7, 8, 9], QUESTION])
    whole = model.generate(questions, sampler="first_hitting") if name != "ar" else model.generate(questions)
    limited = model.generate(questions, max_new_tokens=limit)
    lengths = (limited.sequences[:, 5:] != PAD).sum(dim=1)
    block = {"block by block, without": 8, "ar": 1}.get(name, 4)
    opener = int(name == "ar")  # a token that the autoregressive model is given, not one that it writes
    for row, length in enumerate(lengths.tolist()):
        assert length == min(limit // block * block + opener, int((whole.sequences[row, 5:] != PAD).sum()))
        assert not limited.finished[row]
        assert int(limited.num_forward_passes[row]) <= length


def test_max_new_tokens_of_less_than_a_block_is_refused():
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 6, one block, but got 5"):
        speaker().generate(torch.tensor([QUESTION]), max_new_tokens=5)


def test_do_sample_is_read_as_temperature():
    model, question = speaker(), torch.tensor([QUESTION])
    greedy, sampled = (
        model.generate(question, temperature=temperature, seed=1).sequences.tolist() for temperature in (0.0, 1.0)
    )
    assert greedy != sampled
    assert model.generate(question, do_sample=False).sequences.tolist() == greedy
    assert model.generate(question, do_sample=True, seed=1).sequences.tolist() == sampled
    assert model.generate(question, do_sample=True, temperature=1.0, seed=1).sequences.tolist() == sampled
    with pytest.raises(ValueError, match=r"`temperature` must be 0 with do_sample=False, but got 0\.5"):
        model.generate(question, do_sample=False, temperature=0.5)


def test_ids_of_special_tokens_must_be_those_of_the_configuration():
    model, question = speaker(), torch.tensor([QUESTION])
    expected = model.generate(question).sequences.tolist()
    assert model.generate(question, pad_token_id=PAD, eos_token_id=END).sequences.tolist() == expected
    with pytest.raises(ValueError, match="`eos_token_id` must be the configuration's 1 or None, but got 7"):
        model.generate(question, eos_token_id=7)
