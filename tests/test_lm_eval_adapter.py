"""Model for lm-evaluation-harness: generation, likelihood by its definition, and tasks."""

import itertools
import json
import math

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from hierbd3lm.evaluation.lm_eval.adapter import GENERATION_SETTINGS, HierBD3LMHarnessModel
from hierbd3lm.masking_hierbd3lm import TokenLayout
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny_lm_eval import GREEDY, QUESTIONS, requests_of, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


# Generation


def written_by(lm, question, **settings):
    ids = torch.tensor([lm.tokenizer(question)["input_ids"]])
    execution = lm.model.generate(ids, **settings).execution[0]
    return lm.tokenizer.decode(execution)


def test_model_is_registered():
    assert get_model("hierbd3lm") is HierBD3LMHarnessModel


@pytest.mark.parametrize("batch_size", [1, "3"])
def test_answers_are_the_executions_of_the_questions(checkpoint, batch_size):
    lm = HierBD3LMHarnessModel(checkpoint, batch_size=batch_size, sampler="first_hitting", device="cpu")
    answers = lm.generate_until(requests_of("generate_until", *((question, GREEDY) for question in QUESTIONS)))
    assert answers == [written_by(lm, question, sampler="first_hitting") for question in QUESTIONS]
    assert len({*answers}) == len(QUESTIONS)


def test_default_device_of_the_harness_falls_back_to_the_cpu(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = HierBD3LMHarnessModel(checkpoint, device="cuda:0")  # the default of its command line
    assert lm.device.type == lm.model.device.type == "cpu"


def test_answers_end_before_the_first_stop_string(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu")
    whole = written_by(lm, QUESTIONS[0])
    assert len(whole) > 4
    for until, expected in [
        ([whole[2:4], whole[-1]], whole[: min(whole.index(whole[2:4]), whole.index(whole[-1]))]),
        (whole[3], whole[: whole.index(whole[3])]),
        (["Mia", ""], whole),
    ]:
        request = (QUESTIONS[0], GREEDY | {"until": until})
        assert lm.generate_until(requests_of("generate_until", request)) == [expected]


@pytest.mark.parametrize(("max_gen_toks", "most"), [(3, 3), (6, 3), (7, 7), (8, 7), (1000, 11)])
def test_answers_have_at_most_max_gen_toks_tokens(checkpoint, max_gen_toks, most):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu")
    arguments = [(question, GREEDY | {"max_gen_toks": max_gen_toks}) for question in QUESTIONS]
    lengths = [len(lm.tokenizer(text)["input_ids"]) for text in lm.generate_until(requests_of("", *arguments))]
    assert max(lengths) == most


def test_requests_with_different_keywords_keep_their_order(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, batch_size=4, device="cpu")
    short = GREEDY | {"max_gen_toks": 3}
    arguments = [(QUESTIONS[0], GREEDY), (QUESTIONS[0], short), (QUESTIONS[1], GREEDY), (QUESTIONS[1], short)]
    answers = lm.generate_until(requests_of("generate_until", *arguments))
    assert answers[0] == written_by(lm, QUESTIONS[0]) != answers[1]
    assert answers[3] == written_by(lm, QUESTIONS[1], max_execution_len=4) != answers[2]


def test_sampled_answers_depend_on_the_seed(checkpoint):
    keywords = {"until": [], "do_sample": True, "temperature": 1.0}
    requests = requests_of("generate_until", *[(QUESTIONS[0], keywords)] * 8)
    first, again, other = (
        HierBD3LMHarnessModel(checkpoint, batch_size=2, seed=seed, device="cpu").generate_until(requests)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({*first}) > 4


def test_too_long_questions_get_an_empty_answer_and_are_counted(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu")
    arguments = [(question, GREEDY) for question in ("Mia " * 20, QUESTIONS[0], "1" * 13, "1" * 12)]
    answers = lm.generate_until(requests_of("generate_until", *arguments))
    assert answers[0] == answers[2] == ""
    assert answers[1] == written_by(lm, QUESTIONS[0]) and answers[3] == written_by(lm, "1" * 12)
    assert lm.get_model_info()["num_too_long_questions"] == 2


def test_questions_with_special_tokens_get_an_empty_answer_and_are_counted(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu")
    arguments = [(question, GREEDY) for question in ("<|plan|>", QUESTIONS[0], "1" * 13 + "<|end|>")]
    answers = lm.generate_until(requests_of("generate_until", *arguments))
    assert answers == ["", written_by(lm, QUESTIONS[0]), ""]
    info = lm.get_model_info()
    assert (info["num_questions_with_special_tokens"], info["num_too_long_questions"]) == (2, 0)


def test_questions_go_through_the_chat_template_of_the_checkpoint(checkpoint, monkeypatch):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu", likelihood_plan="empty")
    lm.tokenizer.chat_template = "Mia {{ messages[0]['content'] }} Mia"
    plain = written_by(lm, f"Mia {QUESTIONS[0]} Mia")
    monkeypatch.setattr(lm.config, "chat_template", True)
    assert lm.generate_until(requests_of("generate_until", (QUESTIONS[0], GREEDY))) == [plain]
    rendered = lm.loglikelihood(requests_of("loglikelihood", (QUESTIONS[0], "1")))
    rolling = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("1 1",)))
    monkeypatch.setattr(lm.config, "chat_template", False)
    assert rendered == lm.loglikelihood(requests_of("loglikelihood", (f"Mia {QUESTIONS[0]} Mia", "1")))
    assert rolling == lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("1 1",)))


def test_answers_before_an_interruption_are_in_the_cache_of_the_harness(checkpoint, tmp_path, monkeypatch):
    requests = requests_of("generate_until", *((question, GREEDY) for question in QUESTIONS))
    expected = HierBD3LMHarnessModel(checkpoint, device="cpu").generate_until(requests)
    generate, calls = HierBD3LMForBlockDiffusion.generate, []

    def failing(model, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, **kwargs)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", failing)
    for run in range(2):
        lm = CachingLM(HierBD3LMHarnessModel(checkpoint, device="cpu"), str(tmp_path / "cache.db"))
        if run == 0:
            with pytest.raises(KeyboardInterrupt):
                lm.generate_until(requests)
        else:
            assert lm.generate_until(requests) == expected
        lm.dbdict.close()
    assert len(calls) == 2 + 1 + 2


# Likelihood


def next_token_log_probabilities(model, prefix, prefix_blocks, block, block_rank):
    """Log probabilities at each position of a noisy block given all clean tokens before it: `(block, vocab)`."""
    blocks = torch.tensor([[*prefix_blocks, *[block_rank] * len(block)]])
    layout = TokenLayout(
        blocks, (torch.arange(blocks.shape[1]) >= len(prefix)).long()[None], torch.arange(blocks.shape[1])[None]
    )
    with torch.no_grad():
        logits = model.project(model.encode(torch.tensor([[*prefix, *block]]), layout))[0, len(prefix) :]
    logits[:, model.config.mask_token_id] = -math.inf
    return logits.double().log_softmax(dim=-1)


def nelbo_by_definition(model, question, plan, execution):
    """Sum over blocks and non-empty masks of a block: each mask of k of m tokens counts 1 / (k * (m choose k)).

    Args:
        question, plan, execution: tokens; the plan without opener and end, the execution as laid out.
    """
    config = model.config
    plan_size, size = config.plan_block_size, config.execution_block_size
    plan = [config.plan_token_id, *plan, config.end_token_id]
    plan += [config.end_token_id] * (-len(plan) % plan_size)
    plan = plan[: config.plan_len]  # removes the `<|end|>` of a truncated plan
    prefix = [*question, *plan]
    blocks = [0] * len(question) + [1 + i // plan_size for i in range(len(plan))]
    total = 0.0
    for start in range(0, len(execution), size):
        block, rank = execution[start : start + size], blocks[-1] + 1
        places = [i for i in range(size) if start + i > 0]  # the opener is given
        for k in range(1, len(places) + 1):
            for masked in itertools.combinations(places, k):
                noisy = [config.mask_token_id if i in masked else token for i, token in enumerate(block)]
                log_p = next_token_log_probabilities(model, prefix, blocks, noisy, rank)
                nll = -sum(log_p[i, block[i]].item() for i in masked)
                total += nll / (k * math.comb(len(places), k))
        prefix, blocks = prefix + block, blocks + [rank] * size
    return total


def laid_out(lm, text):
    """Lay out an execution: opener, content and `<|end|>` up to the end of a block, none after a full execution."""
    config = lm.config
    tokens = [config.execution_token_id, *lm.tokenizer(text)["input_ids"]]
    while len(tokens) < config.execution_len:
        tokens.append(config.end_token_id)
        if len(tokens) % config.execution_block_size == 0:
            break
    return tokens


def plan_of(lm, question_ids):
    return lm.model.generate(torch.tensor([question_ids], dtype=torch.long), stage="plan").plan[0].tolist()


PAIRS = [(QUESTIONS[0], "12"), (QUESTIONS[1], "1 2 3"), (QUESTIONS[0], ""), ("", "apples"), ("Mia", "1" * 11)]


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("plan", ["generated", "empty"])
def test_exact_loglikelihood_is_the_nelbo_by_its_definition(tmp_path, block_size, plan):
    folder = save_checkpoint(tmp_path, block_size=None, plan_block_size=4, execution_block_size=block_size)
    lm = HierBD3LMHarnessModel(folder, likelihood="exact", likelihood_plan=plan, device="cpu")
    values = [value for value, _ in lm.loglikelihood(requests_of("loglikelihood", *PAIRS))]
    for (question, continuation), value in zip(PAIRS, values, strict=True):
        question_ids = lm.tokenizer(question)["input_ids"]
        plan_ids = plan_of(lm, question_ids) if plan == "generated" else []
        expected = nelbo_by_definition(lm.model, question_ids, plan_ids, laid_out(lm, continuation))
        assert value == pytest.approx(-expected, rel=1e-5)
    assert len({round(value, 4) for value in values}) == len(PAIRS)


def test_loglikelihood_at_block_size_1_is_that_of_next_token_prediction(tmp_path):
    """At block size 1 every draw gives the exact likelihood: the chain rule over tokens."""
    folder = save_checkpoint(tmp_path, block_size=None, plan_block_size=4, execution_block_size=1)
    lm = HierBD3LMHarnessModel(folder, num_draws=1, likelihood_plan="empty", device="cpu")
    question, tokens = lm.tokenizer("Mia has")["input_ids"], laid_out(lm, "3 4")
    prefix, blocks = (
        [*question, lm.config.plan_token_id, *[lm.config.end_token_id] * 3, tokens[0]],
        [0, 0, 1, 1, 1, 1, 2],
    )
    expected = 0.0
    for token in tokens[1:]:
        log_p = next_token_log_probabilities(lm.model, prefix, blocks, [lm.config.mask_token_id], blocks[-1] + 1)
        expected += log_p[0, token].item()
        prefix, blocks = [*prefix, token], [*blocks, blocks[-1] + 1]
    ((value, _),) = lm.loglikelihood(requests_of("loglikelihood", ("Mia has", "3 4")))
    assert value == pytest.approx(expected, rel=1e-5)


def test_monte_carlo_is_unbiased_and_its_draws_are_fixed(checkpoint):
    exact = HierBD3LMHarnessModel(checkpoint, likelihood="exact", device="cpu")
    request = requests_of("loglikelihood_rolling", (PAIRS[1][1],))
    (expected,) = exact.loglikelihood_rolling(request)
    lm, values = HierBD3LMHarnessModel(checkpoint, num_draws=4, batch_size=4, device="cpu"), []
    for lm.seed in range(40):
        values += lm.loglikelihood_rolling(request)
    assert (
        values[7]
        == HierBD3LMHarnessModel(checkpoint, num_draws=4, batch_size=4, seed=7, device="cpu").loglikelihood_rolling(
            request
        )[0]
    )
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std() / math.sqrt(len(values))
    assert 0 < error < 0.1 * abs(expected)
    assert abs(values.mean() - expected) < 4 * error


def test_monte_carlo_does_not_depend_on_other_requests(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, num_draws=5, batch_size=2, device="cpu")
    together = lm.loglikelihood(requests_of("loglikelihood", *PAIRS))
    other = HierBD3LMHarnessModel(checkpoint, num_draws=5, batch_size=5, device="cpu")
    for pair, (value, is_greedy) in reversed(list(zip(PAIRS, together, strict=True))):
        ((alone, is_greedy_alone),) = other.loglikelihood(requests_of("loglikelihood", pair))
        assert alone == pytest.approx(value, rel=1e-5) and is_greedy_alone == is_greedy


@pytest.mark.parametrize("plan", ["generated", "empty"])
def test_is_greedy_agrees_with_generation(checkpoint, plan):
    lm = HierBD3LMHarnessModel(checkpoint, num_draws=1, likelihood_plan=plan, device="cpu")
    pairs, expected = [], []
    for question in QUESTIONS:
        ids = lm.tokenizer(question)["input_ids"]
        plan_ids = plan_of(lm, ids) if plan == "generated" else []
        plan_ids = torch.tensor([plan_ids], dtype=torch.long)
        execution = lm.model.generate(torch.tensor([ids]), plan_ids=plan_ids, stage="execution").execution[0]
        text = lm.tokenizer.decode(execution)
        other_end = text[:-1] + ("1" if text[-1] != "1" else "2")
        pairs += [(question, text), (question, other_end), (question, text[:-1])]
        expected += [True, False, False]
    results = lm.loglikelihood(requests_of("loglikelihood", *pairs))
    assert [is_greedy for _, is_greedy in results] == expected


@pytest.mark.parametrize("plan", ["generated", "empty"])
def test_rolling_text_is_split_into_consecutive_executions(checkpoint, plan):
    lm = HierBD3LMHarnessModel(checkpoint, likelihood="exact", likelihood_plan=plan, device="cpu")
    ids = [*lm.tokenizer("Mia has 12 apples.\n" * 4)["input_ids"]][:27]
    text = lm.tokenizer.decode(ids)
    assert lm.tokenizer(text)["input_ids"] == ids
    windows = [([], ids[:11]), (ids[:11], ids[11:22]), (ids[10:22], ids[22:])]
    expected = 0.0
    for question, execution in windows:
        plan_ids = plan_of(lm, question) if plan == "generated" else []
        tokens = [lm.config.execution_token_id, *execution]
        tokens += [lm.config.end_token_id] * (-len(tokens) % 4 or 4) * (len(tokens) < 12)
        expected += nelbo_by_definition(lm.model, question, plan_ids, tokens)
    value, short = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", (text,), ("12",)))
    assert value == pytest.approx(-expected, rel=1e-5)
    assert short == lm.loglikelihood(requests_of("loglikelihood", ("", "12")))[0][0]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "`batch_size` must be an integer >= 1, but got 'auto'"),
        ({"num_draws": 0}, "`num_draws` must be an integer >= 1, but got 0"),
        ({"likelihood": "ppl"}, "`likelihood` must be one of monte_carlo, exact, but got 'ppl'"),
        ({"likelihood_plan": "none"}, "`likelihood_plan` must be one of generated, empty, but got 'none'"),
        ({"temperature": 1.0}, "`model_args` must be one of sampler, .*, but got 'temperature'"),
        ({"threshold": 2.0}, r"`threshold` must be a number in \(0, 1\], but got 2.0"),
        ({"max_plan_len": 5}, "`max_plan_len` must be a multiple of the block size 4 up to 8, but got 5"),
    ],
)
def test_argument_out_of_range_raises(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        HierBD3LMHarnessModel(checkpoint, device="cpu", **arguments)


def test_exact_likelihood_of_large_blocks_raises(tmp_path):
    folder = save_checkpoint(tmp_path, block_size=None, plan_block_size=4, execution_block_size=12)
    with pytest.raises(
        ValueError, match="`likelihood` must be monte_carlo for execution blocks of more than 8 tokens"
    ):
        HierBD3LMHarnessModel(folder, likelihood="exact", device="cpu")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_beams": 4}, "`gen_kwargs` must be one of until, .*, but got 'num_beams'"),
        ({"max_gen_toks": 2}, "`max_gen_toks` must be at least 3, the number of tokens of a block, but got 2"),
        ({"do_sample": True, "temperature": -1.0}, r"`temperature` must be a finite number >= 0, but got -1\.0"),
    ],
)
def test_keyword_out_of_range_raises(checkpoint, keywords, message):
    lm = HierBD3LMHarnessModel(checkpoint, device="cpu")
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests_of("generate_until", (QUESTIONS[0], GREEDY | keywords)))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("Mia", "1" * 12), ("Mia", "1"), ("Mia", "1" * 13)],
            "at most 11 tokens of execution, but 2 of 3 .* up to 13",
        ),
        ([("1" * 13, "1"), ("1" * 12, "1")], "at most 12 tokens of question, but 1 of 2 have more, up to 13"),
        ([("Mia<|end|>", "1")], "`question_ids` must not contain special tokens, but got end"),
        ([("Mia", "<|mask|>")], "`execution_ids` must not contain special tokens, but got mask"),
    ],
)
def test_target_that_cannot_be_measured_raises(checkpoint, pairs, message):
    with pytest.raises(ValueError, match=message):
        HierBD3LMHarnessModel(checkpoint, device="cpu").loglikelihood(requests_of("loglikelihood", *pairs))


def test_results_record_how_likelihoods_were_measured(checkpoint):
    lm = HierBD3LMHarnessModel(checkpoint, num_draws=7, likelihood_plan="empty", threshold=0.5, device="cpu")
    info = json.loads(json.dumps(lm.get_model_info()))
    assert (
        info["generation_settings"].keys() == {*GENERATION_SETTINGS} >= {"sampler", "threshold", "max_execution_len"}
    )
    assert info["generation_settings"]["threshold"] == 0.5
    assert (info["likelihood"], info["num_draws"], info["likelihood_plan"]) == ("monte_carlo", 7, "empty")
