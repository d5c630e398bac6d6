"""Several plans of a question: what is executed, scored, voted and paid for."""

from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.evaluation import several_plans
from hierbd3lm.evaluation.arguments import EvaluationArguments
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.evaluation.prompts import Prompt
from hierbd3lm.evaluation.runner import evaluate
from hierbd3lm.evaluation.several_plans import Planned, agreements, answer_with_plans, plan_likelihoods
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig
from hierbd3lm.training.objectives import make_objective

from .tiny import make_model
from .tiny_evaluation import without_time
from .tiny_generation import speaker

QUESTIONS = [[7, 8, 9], [10, 11, 12, 13], [14]]
PROMPTS = [Prompt(index, ids, None, []) for index, ids in enumerate(QUESTIONS)]


class Words:
    """A tokenizer whose tokens are numbers; token 39 is the mark of an answer."""

    def decode(self, ids, **kwargs):
        return " ".join("####" if token == 39 else str(token) for token in ids)


def settings(**fields):
    return HierBD3LMGenerationConfig(
        **({"temperature": 1.0, "seed": 5, "sampler": "ancestral", "num_steps": 2} | fields)
    )


@pytest.fixture
def calls(monkeypatch):
    """The calls of `generate`, which are carried out."""
    from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion as Model

    generate, recorded = Model.generate, []

    def spy(model, **kwargs):
        output = generate(model, **kwargs)
        recorded.append(SimpleNamespace(**kwargs, output=output))
        return output

    monkeypatch.setattr(Model, "generate", spy)
    return recorded


def test_the_best_plans_are_executed_and_all_passes_are_counted(calls):
    results = answer_with_plans(
        speaker(), Words(), PROMPTS, settings(), 4, 3, ranking=lambda question, plan: len(plan), num_executed=2
    )
    plans, executions = calls
    assert (plans.generation_config.stage, executions.generation_config.stage) == ("plan", "execution")
    assert (len(plans.input_ids), plans.num_return_sequences) == (3, 4)
    assert (len(executions.input_ids), executions.num_return_sequences) == (3 * 2, 3)
    assert executions.generation_config.temperature == 1.0
    passes = [call.output.num_forward_passes.tolist() for call in calls]
    for place, result in enumerate(results):
        assert result.scores == [len(plan) for plan in result.plans]
        executed = [number for number, texts in enumerate(result.executions) if texts]
        best = sorted(range(4), key=lambda number: -result.scores[number])[:2]
        assert executed == sorted(best) and result.best == best[0]
        assert [len(result.executions[number]) for number in executed] == [3, 3]
        assert result.num_forward_passes == sum(passes[0][4 * place :][:4]) + sum(passes[1][6 * place :][:6])
        given = executions.plan_ids[2 * place : 2 * place + 2].tolist()
        words = [Words().decode([token for token in row if token]) for row in given]
        assert words == [result.plans[number] for number in best]


def test_a_single_execution_is_greedy(calls):
    answer_with_plans(speaker(), Words(), PROMPTS, settings(), 2, ranking=lambda question, plan: 0.0)
    assert calls[1].generation_config.temperature == 0 and calls[0].generation_config.temperature == 1.0


def test_the_verifier_reads_question_and_plan(calls):
    seen = []
    answer_with_plans(speaker(), Words(), PROMPTS, settings(), 2, ranking=lambda *texts: seen.append(texts) or 0.0)
    assert [question for question, _ in seen] == [Words().decode(ids) for ids in QUESTIONS for _ in range(2)]


def test_scores_are_the_exact_likelihood_where_blocks_are_single_tokens():
    """Blocks of one token have no noise: the score is the mean log-probability of the tokens and the `<|end|>`."""
    model = make_model(block_size=1)
    plans = [[20, 21, 22], [23], []]
    scores = plan_likelihoods(model, PROMPTS, plans, num_draws=1, seed=0)
    for question, plan, score in zip(QUESTIONS, plans, scores, strict=True):
        row = {"question_ids": question, "plan_ids": plan, "execution_ids": [30]}
        batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)([row]))
        nelbo = make_objective(model.config).exact(model, batch)
        assert score == pytest.approx(-nelbo[batch["segment_ids"] == 1].sum().item() / (len(plan) + 1), rel=1e-5)


@pytest.mark.parametrize("algorithm", ["hier", "bd3lm", "ar"])
def test_every_algorithm_ranks_its_plans_by_likelihood(algorithm, calls):
    size = None if algorithm == "ar" else 6
    model = speaker(algorithm=algorithm, plan_block_size=size, execution_block_size=size, end_bias=2.0)
    results = answer_with_plans(model, Words(), PROMPTS, settings(), 3, num_draws=2)
    assert any(len(set(result.scores)) > 1 for result in results)
    for place, result in enumerate(results):
        assert all(score < 0 for score in result.scores)
        assert [bool(texts) for texts in result.executions] == [number == result.best for number in range(3)]
        generated = sum(calls[0].output.num_forward_passes[3 * place :][:3].tolist())
        assert result.num_forward_passes == generated + 2 * 3 + int(calls[1].output.num_forward_passes[place])


def test_agreement_executes_all_plans(calls):
    results = answer_with_plans(speaker(), Words(), PROMPTS, settings(), 3, 2, ranking="agreement")
    assert (len(calls[1].input_ids), calls[1].num_return_sequences) == (3 * 3, 2)
    assert all(len(texts) == 2 for result in results for texts in result.executions)


def test_agreement_is_the_share_of_executions_with_the_plans_own_answer():
    executions = [["#### 4", "#### 4", "#### 5"], ["#### 5", "#### 5", "5"], ["x", "y", ""]]
    assert agreements(executions) == [2 / 9, 3 / 9, 0.0]
    result = Planned(["a", "b", "c"], agreements(executions), executions, 0, 0)
    assert result.best == 1 and result.answer == Decimal(5)
    assert Planned(["a"], [0.0], [["x"]], 0, 0).answer is None


@pytest.mark.parametrize(
    "numbers, changes, message",
    [
        ((0, 1), {}, "`num_plans` must be at least 1, but got 0"),
        ((2, 0), {}, "`executions_per_plan` must be at least 1, but got 0"),
        ((2, 1), {"num_executed": 3}, r"`num_executed` must be in \[1, 2\], but got 3"),
        (
            (2, 1),
            {"ranking": "score"},
            "`ranking` must be one of likelihood, agreement or a function",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, changes, message):
    with pytest.raises(ValueError, match=message):
        answer_with_plans(speaker(), Words(), PROMPTS, settings(), *numbers, **changes)


def test_several_plans_need_a_temperature():
    with pytest.raises(ValueError, match="`temperature` must be > 0 for num_plans=2 and executions_per_plan=1"):
        answer_with_plans(speaker(), Words(), PROMPTS, settings(temperature=0.0), 2)
    torch.manual_seed(0)
    assert len(answer_with_plans(speaker(), Words(), PROMPTS, settings(temperature=0.0), 1)) == 3


# The evaluation


@pytest.mark.slow
def test_the_evaluation_writes_a_line_per_execution_and_counts_all_passes(args, monkeypatch):
    planned = []

    def spy(*arguments, **settings):
        results = answer_with_plans(*arguments, **settings)
        planned.extend(results)
        return results

    monkeypatch.setattr(several_plans, "answer_with_plans", spy)
    run = {"num_plans": 3, "executions_per_plan": 2, "num_executed_plans": 2, "temperature": 1.0, "batch_size": 4}
    predictions, summary = evaluate(args(**run))
    assert summary["num_samples"] == 4 and len(predictions) == 4 * summary["n"] and "majority_vote" in summary
    assert summary["num_forward_passes"] == sum(result.num_forward_passes for result in planned)
    assert summary["num_tokens"] == sum(result.num_tokens for result in planned)
    for start in range(0, len(predictions), 4):
        plans = [line["plan"] for line in predictions[start : start + 4]]
        assert plans[0] == plans[1] and plans[2] == plans[3]
    lines = Path(args(**run).output_dir, "predictions.jsonl")
    text = lines.read_text()
    lines.write_text("\n".join(text.split("\n")[:6]) + "\n")  # the second question of the first batch is cut
    again, _ = evaluate(args(**run))
    assert without_time(again) == without_time(predictions)
    with pytest.raises(ValueError, match="num_plans: 3 stored, 2 now"):
        evaluate(args(**(run | {"num_plans": 2})))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_plans": 2, "num_samples": 2}, "`num_samples` must be 1 with `num_plans`, but got 2"),
        (
            {"num_plans": 2, "given_plan": "reference"},
            "`given_plan` must be None with `num_plans`, but got 'reference'",
        ),
        ({"executions_per_plan": 2}, "`executions_per_plan` must be 1 without `num_plans`, but got 2"),
        (
            {"num_plans": 2, "plan_ranking": "best"},
            "`plan_ranking` must be one of likelihood, agreement, but got 'best'",
        ),
        ({"num_plans": 0}, "`num_plans` must be at least 1, but got 0"),
    ],
)
def test_settings_of_the_evaluation_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(model="x", **settings)
