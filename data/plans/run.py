"""A run that writes plans: the replies of a language model, and the dataset of plans selected from them.

Files in the folder of a run: `manifest.json` (its settings) and `replies.jsonl` (one line per reply, appended on
arrival); once all replies have arrived, `plans.jsonl` (the dataset, one row per problem with a plan), `rejected.jsonl`
(the rejected replies, with the reason), `summary.json` (counts) and `README.md` (the dataset card). An interrupted run
resumes with the missing replies; a complete run requests none and writes the other files again.
"""

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from ... import __version__
from ..run_folder import Log, hash_of, start_run, write_json, write_lines
from ..steps import make_row, number_steps
from .arguments import WritePlansArguments
from .filters import FILTERS, PlanDraft, find_rejection, score
from .hub import CARD_FILE, PLANS_FILE, push_plans, write_card
from .problems import SolvedProblem, load_problems
from .prompt import plan_messages, plan_schema
from .writers import PlanReply, PlanRequest, PlanWriter, ServerWriter, VllmWriter

logger = logging.get_logger(__name__)

MANIFEST_FILE, REPLIES_FILE = "manifest.json", "replies.jsonl"
REJECTED_FILE, SUMMARY_FILE = "rejected.jsonl", "summary.json"
RESULT_FILES = (REPLIES_FILE, PLANS_FILE, REJECTED_FILE, SUMMARY_FILE, CARD_FILE)
MAX_REFUSALS = 20  # consecutive ones: the server refuses all requests, not single ones


def write_plans(args: WritePlansArguments) -> dict[str, Any]:
    """Write plans, resuming an interrupted run; returns the summary (see [`choose_plans`]).

    Raises:
        ValueError: if the folder contains another run or is in use by another process, as in [`load_problems`], and
            if the server refuses `MAX_REFUSALS` consecutive requests.
    """
    folder = Path(args.output_dir)
    problems = load_problems(args.dataset, args.split, args.limit)
    manifest = describe_run(args, problems)
    start_run(folder, manifest, MANIFEST_FILE, RESULT_FILES, args.overwrite)
    with Log(folder / REPLIES_FILE) as log:
        write_missing_replies(args, problems, log)
        rows, rejected, summary = choose_plans(problems, log.records, args.num_samples, args.fallback)
        write_lines(folder / REJECTED_FILE, rejected)
        write_lines(folder / PLANS_FILE, rows)
        write_json(folder / SUMMARY_FILE, summary)
        write_card(folder, manifest, summary)
    if args.push_to_hub is not None:
        push_plans(folder, args.push_to_hub, args.private)
    return summary


def describe_run(args: WritePlansArguments, problems: list[SolvedProblem]) -> dict[str, Any]:
    """Describe a run: everything that requests and replies depend on, except for the server."""
    return {
        "dataset": args.dataset,
        "split": args.split,
        "num_problems": len(problems),
        "hash_of_problems": hash_of([[problem.question, problem.solution] for problem in problems]),
        "writer": "vllm" if args.base_url is None else "server",
        "model": args.model,
        "prompt_hash": hash_of([plan_messages("{question}", ["{step}"]), plan_schema(1)]),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "version": __version__,
    } | asdict(args.sampling())


# The replies


def write_missing_replies(args: WritePlansArguments, problems: list[SolvedProblem], log: Log) -> None:
    """Request all replies that the log lacks, and append each when it arrives."""
    there = {(record["index"], record["sample"]) for record in log.records}
    num_replies = len(problems) * args.num_samples
    if len(there) == num_replies:
        return
    requests = (
        request_plan(problem, sample, args.seed)
        for problem in problems
        for sample in range(args.num_samples)
        if (problem.index, sample) not in there
    )
    with tqdm(total=num_replies, initial=len(there), desc="Writing plans", unit="plan") as progress:
        asyncio.run(_collect(make_writer(args), requests, log, progress))


def make_writer(args: WritePlansArguments) -> PlanWriter:
    """Return the writer that the arguments select."""
    if args.base_url is None:
        return VllmWriter(args.model, args.sampling(), tensor_parallel_size=args.tensor_parallel_size)
    return ServerWriter(args.base_url, args.model, args.sampling(), args.concurrency, args.timeout, args.max_retries)


def request_plan(problem: SolvedProblem, sample: int, seed: int) -> PlanRequest:
    """Return the request for a sample; the same in every run with this seed."""
    digest = hashlib.sha256(f"{seed} {problem.index} {sample}".encode()).digest()
    return PlanRequest(
        index=problem.index,
        sample=sample,
        messages=plan_messages(problem.question, problem.execution_steps),
        schema=plan_schema(len(problem.execution_steps)),
        seed=int.from_bytes(digest[:4], "big") >> 1,  # 31 bits: every server takes them
    )


async def _collect(writer: PlanWriter, requests: Iterable[PlanRequest], log: Log, progress: tqdm) -> None:
    """Append the replies to the log. Refused requests are not logged: a resumed run sends them again."""
    refusals: list[PlanReply] = []  # since the last reply
    async with aclosing(writer.write(requests)) as replies:
        async for reply in replies:
            progress.update()
            if reply.refusal is None:
                log.append({name: value for name, value in asdict(reply).items() if name != "refusal"})
                refusals.clear()
                continue
            refusals.append(reply)
            logger.warning(f"The server refuses problem {reply.index}, sample {reply.sample}: {reply.refusal}")
            if len(refusals) == MAX_REFUSALS:
                raise ValueError(
                    f"the server must answer, but it refused {MAX_REFUSALS} consecutive requests, the last with: "
                    f"{reply.refusal}"
                )


# The dataset


def choose_plans(
    problems: list[SolvedProblem], records: list[dict[str, Any]], num_samples: int, fallback: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Choose for each problem the reply with the highest score (the first of equals) of those that pass all filters.

    Args:
        records: replies, in any order: `index`, `sample`, `text`, `is_cut_off`.
        num_samples: number of replies requested per problem.
        fallback: `rule` uses the rule-based plan for a problem without such a reply; None omits the problem.

    Returns:
        - rows in the problems' order: `index`, the columns of [`make_row`], `plan_source` (`model` or `rule`) and
          `score` (None for `rule`).
        - the rejected replies: `index`, `sample`, `rejected_by` (a name of `FILTERS`), `text`.
        - the summary: `num_problems`; `num_replies`, of these `num_accepted`, and `rejected_by` (a count for each
          filter); `num_refused` (requested but not received); `num_plans`, of these `num_plans_by_model` and
          `num_plans_by_rule`; `num_without_plan`.
    """
    replies: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["sample"]):
        replies[record["index"]].append(record)
    rows, rejected = [], []
    for problem in problems:
        accepted, rejected_here = judge_replies(problem, replies[problem.index])
        rejected += rejected_here
        if accepted or fallback == "rule":
            rows.append(_make_plan_row(problem, max(accepted, key=score, default=None)))
    return rows, rejected, _count(problems, records, rows, rejected, num_samples)


def judge_replies(
    problem: SolvedProblem, records: list[dict[str, Any]]
) -> tuple[list[PlanDraft], list[dict[str, Any]]]:
    """Return the drafts that pass all filters, and the records of the others with the name of the filter."""
    accepted, rejected = [], []
    for record in records:
        draft = PlanDraft.read(problem, record["text"], record["is_cut_off"])
        name = find_rejection(draft)
        if name is None:
            accepted.append(draft)
        else:
            rejected.append(
                {"index": problem.index, "sample": record["sample"], "rejected_by": name, "text": record["text"]}
            )
    return accepted, rejected


def _make_plan_row(problem: SolvedProblem, draft: PlanDraft | None) -> dict[str, Any]:
    plan_steps = problem.rule_plan_steps if draft is None else number_steps(draft.steps)
    return {
        "index": problem.index,
        **make_row(problem.question, plan_steps, problem.execution_steps, problem.answer),
        "plan_source": "rule" if draft is None else "model",
        "score": None if draft is None else score(draft),
    }


def _count(
    problems: list[SolvedProblem],
    records: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    num_samples: int,
) -> dict[str, Any]:
    sources = Counter(row["plan_source"] for row in rows)
    reasons = Counter(reply["rejected_by"] for reply in rejected)
    return {
        "num_problems": len(problems),
        "num_replies": len(records),
        "num_refused": len(problems) * num_samples - len(records),
        "num_accepted": len(records) - len(rejected),
        "rejected_by": {name: reasons[name] for name in FILTERS},
        "num_plans": len(rows),
        "num_plans_by_model": sources["model"],
        "num_plans_by_rule": sources["rule"],
        "num_without_plan": len(problems) - len(rows),
    }
