"""Several plans for a question, and executions of the best of them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.collator import HierarchicalDataCollator
from ..data.decoding import decode
from ..data.gsm8k.answers import count_votes, cut_at_stops
from ..masking_hierbd3lm import PLAN, SEGMENT_NAMES
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from ..training.objectives import make_objective
from ..training.seeding import seeded_generator
from .arguments import PLAN_RANKINGS
from .likelihood import measure_batch, with_predicted_tokens
from .prompts import Problem, Prompt
from .runner import Written, generate_batch, score_written

LIKELIHOOD, AGREEMENT = PLAN_RANKINGS
Verifier = Callable[[str, str], float]  # score of a question and a plan; the greatest is the best


@dataclass(frozen=True)
class PlanChoice:
    """Arguments of [`answer_with_plans`]: how many plans are written, and which of them are executed."""

    num_plans: int
    executions_per_plan: int = 1
    ranking: str | Verifier = LIKELIHOOD
    num_executed: int = 1

    @property
    def num_samples(self) -> int:
        """Number of executions of a question."""
        return self.executions_per_plan * (self.num_plans if self.ranking == AGREEMENT else self.num_executed)


@dataclass
class Planned:
    """The plans of a question, and executions of some of them.

    Args:
        plans: texts of the plans.
        scores: score of each plan, the greatest is the best.
        executions: the executions of each plan; none of a plan that was not executed.
        num_forward_passes: passes of all rows of the question: plans, scores and executions.
        num_tokens: denoised tokens of all rows.
        written: the executions as they were generated.
    """

    plans: list[str]
    scores: list[float]
    executions: list[list[str]]
    num_forward_passes: int
    num_tokens: int
    written: list[list[Written]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Index of the best plan, the first among equals."""
        return max(range(len(self.plans)), key=self.scores.__getitem__)

    @property
    def answer(self) -> Decimal | None:
        """The answer that most executions give, as a number; None if none gives one."""
        votes = count_votes(cut_at_stops(text) for texts in self.executions for text in texts)
        return votes[0][0] if votes else None


def answer_with_plans(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: HierBD3LMGenerationConfig,
    num_plans: int,
    executions_per_plan: int = 1,
    ranking: str | Verifier = LIKELIHOOD,
    num_executed: int = 1,
    num_draws: int = 2,
) -> list[Planned]:
    """Write several plans for each question, execute the best, and vote.

    Args:
        prompts: encoded questions, see [`~evaluation.prompts.encode_prompt`].
        settings: generation settings; several plans, or several executions of one, need a temperature > 0. A single
            execution of a plan is greedy.
        num_plans, executions_per_plan: numbers of plans for a question, and of executions of each plan.
        ranking: score of a plan. `likelihood`: its mean log-likelihood per token (of the bound, which costs
            `num_draws` passes), or minus infinity for a plan that was cut at its greatest length. `agreement`: the
            fraction of all executions with the answer that its own executions give most often; all plans are
            executed. Or a function of question and plan.
        num_executed: number of best plans that are executed; ignored for `agreement`.

    Raises:
        ValueError: for an unknown ranking, a number out of its range, or several samples at temperature 0.
    """
    check_plans(num_plans, executions_per_plan, ranking, num_executed, settings)
    questions = [prompt for prompt in prompts for _ in range(num_plans)]
    of_stage = resolve_settings(settings, {"stage": "plan"})
    plans = generate_batch(model, prompts, of_stage, tokenizer=tokenizer, num_answers=num_plans)
    of_question = [range(start, start + num_plans) for start in range(0, len(plans), num_plans)]
    texts = [decode(plan.plan_ids, tokenizer) for plan in plans]
    costs = [_cost([plans[row] for row in rows]) for rows in of_question]
    if ranking == LIKELIHOOD:
        most = model.config.plan_len - 2  # opener and `<|end|>` count
        ids = [plan.plan_ids[:most] for plan in plans]
        scores = plan_likelihoods(model, questions, ids, num_draws, settings.seed or 0)
        scores = [score if plan.finished else -math.inf for score, plan in zip(scores, plans, strict=True)]
        costs = [(passes + num_draws * num_plans, tokens) for passes, tokens in costs]
    elif ranking == AGREEMENT:
        scores, num_executed = [0.0] * len(plans), num_plans
    else:
        asked = [decode(prompt.question_ids, tokenizer) for prompt in questions]
        scores = [float(ranking(question, plan)) for question, plan in zip(asked, texts, strict=True)]
    chosen = [sorted(rows, key=lambda row: -scores[row])[:num_executed] for rows in of_question]
    rows_of_best = [row for rows in chosen for row in rows]
    written = execute(model, tokenizer, questions, plans, rows_of_best, executions_per_plan, settings)
    results = []
    for rows, best, (passes, tokens) in zip(of_question, chosen, costs, strict=True):
        more_passes, more_tokens = _cost([execution for row in best for execution in written[row]])
        of_plans = [written.get(row, []) for row in rows]
        executions = [[decode(one.execution_ids, tokenizer) for one in of_plan] for of_plan in of_plans]
        plan_scores = agreements(executions) if ranking == AGREEMENT else [scores[row] for row in rows]
        costs_of_all = passes + more_passes, tokens + more_tokens
        results.append(Planned([texts[row] for row in rows], plan_scores, executions, *costs_of_all, of_plans))
    return results


def answer_problems(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[Problem]],
    settings: HierBD3LMGenerationConfig,
    choice: PlanChoice,
) -> list[dict[str, Any]]:
    """Answer and score problems with [`answer_with_plans`].

    Args:
        groups: for each question the problem once for each of `choice.num_samples` executions.

    Returns:
        a line of `predictions.jsonl` for each execution, those of the best plan first. The first line of a question
        has the forward passes and tokens of all its plans and of their scores, too.
    """
    start = time.perf_counter()
    firsts = [group[0] for group in groups]
    results = answer_with_plans(model, tokenizer, firsts, settings, **vars(choice))
    seconds = (time.perf_counter() - start) / sum(map(len, groups))
    lines = []
    for group, result in zip(groups, results, strict=True):
        best_first = sorted(range(len(result.plans)), key=lambda number: -result.scores[number])
        written = [one for number in best_first for one in result.written[number]]
        passes, tokens = _cost(written)
        more = result.num_forward_passes - passes, result.num_tokens - tokens
        for problem, one in zip(group, written, strict=True):
            lines.append(score_written(problem, one, tokenizer, seconds, *more))
            more = 0, 0
    return lines


def check_plans(
    num_plans: int,
    executions_per_plan: int,
    ranking: str | Verifier,
    num_executed: int,
    settings: HierBD3LMGenerationConfig,
) -> None:
    """Raise a ValueError for arguments of [`answer_with_plans`] that do not fit together."""
    if not callable(ranking) and ranking not in PLAN_RANKINGS:
        raise ValueError(f"`ranking` must be one of {', '.join(PLAN_RANKINGS)} or a function, but got {ranking!r}")
    for name, value, most in (
        ("num_plans", num_plans, None),
        ("executions_per_plan", executions_per_plan, None),
        ("num_executed", num_executed, num_plans),
    ):
        if value < 1 or (most is not None and value > most):
            accepted = "at least 1" if most is None else f"in [1, {most}]"
            raise ValueError(f"`{name}` must be {accepted}, but got {value}")
    if max(num_plans, executions_per_plan) > 1 and settings.temperature == 0:
        raise ValueError(
            f"`temperature` must be > 0 for num_plans={num_plans} and executions_per_plan={executions_per_plan}, but "
            f"got 0: greedy samples are all the same"
        )


def execute(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Prompt],
    plans: Sequence[Written],
    rows: Sequence[int],
    executions_per_plan: int,
    settings: HierBD3LMGenerationConfig,
) -> dict[int, list[Written]]:
    """Execute the plans of some rows several times each, in one batch; greedily if once."""
    stage = {"stage": "execution"} | ({"temperature": 0.0} if executions_per_plan == 1 else {})
    most = model.config.plan_len - 1  # of a plan that is given
    prompts = [replace(questions[row], plan_ids=plans[row].plan_ids[:most]) for row in rows]
    of_stage = resolve_settings(settings, stage)
    written = generate_batch(model, prompts, of_stage, tokenizer=tokenizer, num_answers=executions_per_plan)
    starts = range(0, len(written), executions_per_plan)
    groups = [written[start : start + executions_per_plan] for start in starts]
    return dict(zip(rows, groups, strict=True))


def plan_likelihoods(
    model: HierBD3LMForBlockDiffusion,
    questions: Sequence[Prompt],
    plans: Sequence[list[int]],
    num_draws: int,
    seed: int,
) -> list[float]:
    """Return the mean log-likelihood per token of each plan given its question: a bound, from noise draws."""
    pairs = zip(questions, plans, strict=True)
    rows = [{"question_ids": prompt.question_ids, "plan_ids": plan, "execution_ids": []} for prompt, plan in pairs]
    inputs = {name: ids.to(model.device) for name, ids in HierarchicalDataCollator(model.config)(rows).items()}
    batch = with_predicted_tokens(model, inputs)
    batch["maskable"] &= batch["segment_ids"] == PLAN
    generator = seeded_generator(model.device, seed)
    nats = measure_batch(make_objective(model.config), model, batch, num_draws, generator)
    place = list(SEGMENT_NAMES).index(PLAN)
    return (-nats[:, :-1, place].mean(dim=1) / nats[:, -1, place]).tolist()


def agreements(executions: Sequence[Sequence[str]]) -> list[float]:
    """Return for each plan the fraction of all executions whose answer is the most frequent one among its own."""
    everything = dict(count_votes(cut_at_stops(text) for texts in executions for text in texts))
    total = sum(map(len, executions))
    scores = []
    for texts in executions:
        votes = count_votes(map(cut_at_stops, texts))
        scores.append(everything[votes[0][0]] / total if votes else 0.0)
    return scores


def _cost(written: Sequence[Written]) -> tuple[int, int]:
    """Return forward passes and denoised tokens."""
    return sum(one.num_forward_passes for one in written), sum(one.num_tokens for one in written)
