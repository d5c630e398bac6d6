"""Scores of answers, and their summary."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..data.gsm8k.answers import (
    answer_is_cut,
    count_votes,
    cut_at_stops,
    is_parsable,
    match_flexible,
    match_numeric,
    match_strict,
    parse_number,
    pass_at_k,
    wilson_interval,
)
from .prompts import Problem

RATES = ("exact_match_strict", "exact_match_flexible", "exact_match_numeric", "plan_match", "unparsable", "finished")


def score(
    problem: Problem,
    plan: str,
    execution: str,
    finished: bool = False,
    num_forward_passes: int = 0,
    num_tokens: int = 0,
    num_plan_tokens: int = 0,
    num_execution_tokens: int = 0,
    tokens_per_forward: float | None = None,
    seconds: float = 0.0,
    plan_followed: bool | None = None,
) -> dict[str, Any]:
    """Score an answer; returns a line of `predictions.jsonl`. An unanswered problem has empty texts and no match.

    Args:
        finished, num_forward_passes, tokens_per_forward, plan_followed: see `HierBD3LMGenerationOutput`.
        num_tokens: number of denoised tokens, including one `<|end|>` per segment.
        num_plan_tokens, num_execution_tokens: numbers of content tokens, denoised or given.
        seconds: time of the batch divided by its size.
    """
    answer, target = cut_at_stops(execution), problem.reference_answer
    compares_plans = problem.reference_plan is not None and problem.plan_ids is None
    return {
        "index": problem.index,
        "sample": problem.sample,
        "question": problem.question,
        "plan": plan,
        "execution": execution,
        "reference_answer": target,
        "reference_plan": problem.reference_plan,
        "exact_match_strict": match_strict(answer, target),
        "exact_match_flexible": match_flexible(answer, target),
        "exact_match_numeric": match_numeric(answer, target),
        "unparsable": not is_parsable(answer),
        "plan_match": same_text(plan, problem.reference_plan) if compares_plans else None,
        "too_long": problem.too_long,
        "has_special_token": problem.has_special_token,
        "finished": finished,
        "num_forward_passes": num_forward_passes,
        "num_tokens": num_tokens,
        "num_plan_tokens": num_plan_tokens,
        "num_execution_tokens": num_execution_tokens,
        "tokens_per_forward": tokens_per_forward,
        "seconds": seconds,
        **({} if plan_followed is None else {"plan_followed": plan_followed}),
    }


def same_text(text: str, other: str) -> bool:
    """Return whether two texts are equal up to white space."""
    return text.split() == other.split()


# Summary


def summarize(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize all predictions.

    Returns:
        - `n`: number of examples; `num_samples`: answers per example; `num_too_long` and `num_plan_too_long`: examples
          with an over-long question or given plan, and `num_with_special_tokens`: examples with a special token in
          one of these texts, all of which are not answered but count in `n`.
        - each of `RATES` as a fraction, with its 95 % interval `..._interval`. A rate is the mean over examples of the
          mean over their samples (with several samples the interval is conservative). `plan_match` averages over the
          `num_reference_plans` examples with a reference plan, and is omitted if there are none.
        - `num_cut_answers`: answers whose `####` comes after a stop string, and is not read.
        - with `execution_order="plan"`, `num_plans_not_followed`: answers whose plan could not be parsed, or has too
          many steps, so that their steps have the total order.
        - for several samples, the metrics of [`summarize_samples`].
        - `num_forward_passes`, `num_tokens`, `seconds` (totals), `num_forward_passes_mean` (NFE per answer),
          `tokens_per_forward`, `tokens_per_second` (ratios of totals); None if nothing was answered.
    """
    examples = [list(samples) for _, samples in groupby(predictions, key=itemgetter("index"))]
    summary: dict[str, Any] = {
        "n": len(examples),
        "num_samples": len(examples[0]),
        "num_too_long": _count_too_long(examples, "question"),
        "num_plan_too_long": _count_too_long(examples, "plan"),
        "num_cut_answers": sum(answer_is_cut(prediction["execution"]) for prediction in predictions),
        "num_with_special_tokens": sum(any(s["has_special_token"] for s in samples) for samples in examples),
    }
    for name in RATES:
        values = [[sample[name] for sample in samples] for samples in examples if samples[0][name] is not None]
        if name == "plan_match":
            summary["num_reference_plans"] = len(values)
        if values:
            summary |= rate(name, [sum(rights) / len(rights) for rights in values])
    if any("plan_followed" in prediction for prediction in predictions):
        summary["num_plans_not_followed"] = sum(not p.get("plan_followed", True) for p in predictions)
    if summary["num_samples"] > 1:
        summary |= summarize_samples(examples)
    totals = {
        name: sum(prediction[name] for prediction in predictions)
        for name in ("num_forward_passes", "num_tokens", "seconds")
    }
    num_answered = sum(
        not prediction["too_long"] and not prediction["has_special_token"] for prediction in predictions
    )
    return (
        summary
        | totals
        | {
            "num_forward_passes_mean": _ratio(totals["num_forward_passes"], num_answered),
            "tokens_per_forward": _ratio(totals["num_tokens"], totals["num_forward_passes"]),
            "tokens_per_second": _ratio(totals["num_tokens"], totals["seconds"]),
        }
    )


def summarize_samples(examples: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Compute majority vote and pass@k over the samples of each example.

    Returns:
        - `majority_vote`: fraction of the examples whose most frequent value is the reference's. A sample votes with
          the value of its strict answer; ties are won by the earliest sample. Samples without a value do not vote
          (`num_unparsable_votes`); an example without votes counts as wrong (`num_without_votes`); `num_tied_votes`
          examples have a tie.
        - `pass_at_k` for k = 1, ..., samples: unbiased estimate of the probability that at least one of k samples has
          the right value.
        - the 95 % interval of each, as `..._interval`.
    """
    elections = [count_votes(cut_at_stops(sample["execution"]) for sample in samples) for samples in examples]
    targets = [parse_number(samples[0]["reference_answer"]) for samples in examples]
    num_samples = len(examples[0])
    summary = {
        "num_unparsable_votes": sum(sample["unparsable"] for samples in examples for sample in samples),
        "num_without_votes": sum(not votes for votes in elections),
        "num_tied_votes": sum(len(votes) > 1 and votes[0][1] == votes[1][1] for votes in elections),
    }
    winners = [votes[0][0] if votes else None for votes in elections]
    summary |= rate(
        "majority_vote",
        [winner is not None and winner == target for winner, target in zip(winners, targets, strict=True)],
    )
    num_right = [sum(sample["exact_match_numeric"] for sample in samples) for samples in examples]
    for k in range(1, num_samples + 1):
        summary |= rate(f"pass_at_{k}", [pass_at_k(num_samples, count, k) for count in num_right])
    return summary


def rate(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of values in [0, 1] as `name`, and its 95 % interval as `{name}_interval`."""
    total = sum(values)
    return {name: total / len(values), f"{name}_interval": list(wilson_interval(total, len(values)))}


def _count_too_long(examples: Sequence[Sequence[dict[str, Any]]], segment: str) -> int:
    return sum(any(segment in sample["too_long"] for sample in samples) for samples in examples)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def format_summary(summary: dict[str, Any]) -> str:
    """Format the summary as a table."""
    lines = []
    num_samples = summary["num_samples"]
    powers = [k for k in (2**i for i in range(num_samples.bit_length())) if k <= num_samples]
    samples = ["majority_vote", *(f"pass_at_{k}" for k in sorted({*powers, num_samples}))]
    for name in [*RATES, *samples]:
        if name in summary:
            low, high = summary[f"{name}_interval"]
            value = f"{100 * summary[name]:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append((name.replace("_", " "), value))
    counts = {"examples": "n", "samples / example": "num_samples"} if num_samples > 1 else {"examples": "n"}
    counts |= {"too long question": "num_too_long", "too long plan": "num_plan_too_long"}
    counts |= {"answer after stop string": "num_cut_answers", "reference answer lost": "num_lost_references"}
    counts |= {"special token in text": "num_with_special_tokens", "plan not followed": "num_plans_not_followed"}
    lines += [(label, f"{summary[name]:6,}") for label, name in counts.items() if name in summary]
    speeds = {"forward passes / answer": "num_forward_passes_mean"}
    speeds |= {f"tokens / {unit}": f"tokens_per_{unit}" for unit in ("forward", "second")}
    lines += [(label, f"{summary[name]:9,.2f}") for label, name in speeds.items() if summary[name] is not None]
    return "\n".join(f"{label:<26}{value}" for label, value in lines)


def format_prediction(prediction: dict[str, Any]) -> str:
    """Format a problem with its answer."""
    verdict = "right" if prediction["exact_match_numeric"] else "wrong"
    sample = f", sample {prediction['sample']}" if prediction["sample"] else ""
    return "\n".join(
        [
            f"--- Example {prediction['index']}{sample}: {verdict}, the answer is {prediction['reference_answer']}",
            f"Question: {prediction['question']}",
            f"Plan:\n{prediction['plan']}",
            f"Execution:\n{prediction['execution']}\n",
        ]
    )
