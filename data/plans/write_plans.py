"""Write plans with a language model: `python -m hierbd3lm.data.plans.write_plans --help`.

The output folder contains `manifest.json` (the settings of the run) and `replies.jsonl` (a line per reply, appended
as it arrives). When all replies have arrived, they are evaluated: `plans.jsonl` (the dataset, a row per problem with a
plan), `rejected.jsonl` (the rejected replies and the reasons), `summary.json` (the counts) and `README.md` (the
dataset card). A run that was killed resumes after its last reply. A complete run requests no replies and only
rewrites the other files.
"""

import asyncio
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from ... import __version__
from ..arguments import check_at_least
from ..run_folder import Log, hash_of, start_run, write_json, write_lines
from ..steps import make_row, number_steps
from .filters import FILTERS, PlanDraft, find_rejection, score
from .hub import CARD_FILE, PLANS_FILE, push_plans, write_card
from .problems import SolvedProblem, load_problems
from .prompt import plan_messages, plan_schema
from .writers import PlanRequest, PlanWriter, SamplingSettings, ServerWriter, VllmWriter

logger = logging.get_logger(__name__)

MANIFEST_FILE, REPLIES_FILE = "manifest.json", "replies.jsonl"
REJECTED_FILE, SUMMARY_FILE = "rejected.jsonl", "summary.json"
RESULT_FILES = (REPLIES_FILE, PLANS_FILE, REJECTED_FILE, SUMMARY_FILE, CARD_FILE)
FALLBACKS = ("rule",)
MAX_REFUSALS = 20  # consecutive: the server then refuses every request, not individual ones


@dataclass
class WritePlansArguments:
    """Arguments of the command."""

    dataset: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "`openai/gsm8k`, or a .json or .jsonl file, a folder or a dataset on the Hub with `question` "
            "and `execution`; the execution ends with `#### <answer>`."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset; ignored for a file."})
    limit: int | None = field(default=None, metadata={"help": "Maximum number of problems; all if omitted."})
    output_dir: str = field(default="outputs/plans", metadata={"help": "Output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Delete an existing run in `output_dir`."})

    model: str = field(
        default="meta-llama/Llama-3.1-8B-Instruct",
        metadata={"help": "Folder or Hub id of an instruct model; with `base_url` its name on the server."},
    )
    num_samples: int = field(default=4, metadata={"help": "Number of plans per problem; the best one is kept."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 for greedy decoding."})
    top_p: float = field(default=0.95, metadata={"help": "Cumulative probability for nucleus sampling."})
    max_tokens: int = field(default=512, metadata={"help": "Maximum number of tokens of a plan."})
    structured_output: bool = field(
        default=True, metadata={"help": "Constrain decoding to JSON with as many steps as the solution."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed; the seeds of problems and samples derive from it."})
    fallback: str | None = field(
        default=None, metadata={"help": "`rule`: use the rule-based plan if all plans of a problem are rejected."}
    )

    base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible API, such as http://localhost:8000/v1; if omitted, vllm runs in this "
            "process."
        },
    )
    concurrency: int = field(default=16, metadata={"help": "Maximum number of concurrent requests to the server."})
    timeout: float = field(default=120.0, metadata={"help": "Timeout of a request in seconds."})
    max_retries: int = field(default=10, metadata={"help": "Maximum number of retries of a failed request."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "Number of GPUs for tensor parallelism in vllm."})

    push_to_hub: str | None = field(default=None, metadata={"help": "Id of a dataset on the Hub to upload to."})
    private: bool = field(default=False, metadata={"help": "Create the dataset on the Hub as private."})

    def __post_init__(self):
        for name in ("limit", "num_samples"):
            check_at_least(name, getattr(self, name), 1)
        if self.fallback not in (None, *FALLBACKS):
            raise ValueError(f"`fallback` must be one of {', '.join(FALLBACKS)}, but got {self.fallback!r}")
        self.sampling()

    def sampling(self) -> SamplingSettings:
        """Return the sampling settings."""
        return SamplingSettings(self.temperature, self.top_p, self.max_tokens, self.structured_output)


def parse_arguments(argv: list[str]) -> WritePlansArguments:
    """Parse `[--setting value ...]`."""
    return HfArgumentParser(WritePlansArguments).parse_args_into_dataclasses(argv)[0]


def main() -> None:
    """Write plans and print the summary."""
    args = parse_arguments(sys.argv[1:])
    summary = write_plans(args)
    print(json.dumps(summary, indent=2))
    print(f"{Path(args.output_dir, PLANS_FILE)} has a plan for {summary['num_plans']} of {summary['num_problems']}")


def write_plans(args: WritePlansArguments) -> dict[str, Any]:
    """Write plans, or resume a run, and return its summary (see [`choose_plans`]).

    Raises:
        ValueError: if the folder contains another run or is in use by another process, if [`load_problems`] rejects
            the dataset, and if the server refuses `MAX_REFUSALS` consecutive requests.
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
    """Return all settings that influence the requests and, as far as known, the replies."""
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


# Requesting the replies


def write_missing_replies(args: WritePlansArguments, problems: list[SolvedProblem], log: Log) -> None:
    """Request all replies that the log does not have, and append them as they arrive."""
    logged = {(record["index"], record["sample"]) for record in log.records}
    num_replies = len(problems) * args.num_samples
    if len(logged) == num_replies:
        return
    requests = (
        request_plan(problem, sample, args.seed)
        for problem in problems
        for sample in range(args.num_samples)
        if (problem.index, sample) not in logged
    )
    with tqdm(total=num_replies, initial=len(logged), desc="Writing plans", unit="plan") as progress:
        asyncio.run(_collect(make_writer(args), requests, log, progress))


def make_writer(args: WritePlansArguments) -> PlanWriter:
    """Create the writer for the language model of the arguments."""
    if args.base_url is None:
        return VllmWriter(args.model, args.sampling(), tensor_parallel_size=args.tensor_parallel_size)
    return ServerWriter(args.base_url, args.model, args.sampling(), args.concurrency, args.timeout, args.max_retries)


def request_plan(problem: SolvedProblem, sample: int, seed: int) -> PlanRequest:
    """Make the request for a sample, which is the same in every run with this seed."""
    digest = hashlib.sha256(f"{seed} {problem.index} {sample}".encode()).digest()
    return PlanRequest(
        index=problem.index,
        sample=sample,
        messages=plan_messages(problem.question, problem.execution_steps),
        schema=plan_schema(len(problem.execution_steps)),
        seed=int.from_bytes(digest[:4], "big") >> 1,  # 31 bits, which every server accepts
    )


async def _collect(writer: PlanWriter, requests: Iterable[PlanRequest], log: Log, progress: tqdm) -> None:
    """Append the replies to the log; a refused request is not logged, so that a rerun sends it again."""
    num_refusals = 0  # since the last reply
    async with aclosing(writer.write(requests)) as replies:
        async for reply in replies:
            progress.update()
            if reply.refusal is None:
                log.append({name: value for name, value in asdict(reply).items() if name != "refusal"})
                num_refusals = 0
                continue
            num_refusals += 1
            logger.warning(f"The server refused problem {reply.index}, sample {reply.sample}: {reply.refusal}")
            if num_refusals == MAX_REFUSALS:
                raise ValueError(
                    f"the server has refused {MAX_REFUSALS} consecutive requests, the last with: {reply.refusal}"
                )


# Evaluating the replies


def choose_plans(
    problems: list[SolvedProblem], records: list[dict[str, Any]], num_samples: int, fallback: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Choose for each problem, among the replies that pass the filters, the one with the best score.

    Ties are broken by the lowest sample number.

    Args:
        records: replies, in any order: `index`, `sample`, `text`, `is_cut_off`.
        num_samples: number of requested replies per problem.
        fallback: `rule` to use the rule-based plan for a problem without an accepted reply; None to omit the problem.

    Returns:
        - rows in the order of the problems: `index`, the columns of [`make_row`], `plan_source` (`model` or `rule`)
          and `score` (None for `rule`).
        - the rejected replies: `index`, `sample`, `rejected_by` (a key of `FILTERS`), `text`.
        - the summary: `num_problems`; `num_replies`, of these `num_accepted`, and `rejected_by` (a count for each
          filter); `num_refused` (requested without a reply); `num_plans`, of these `num_plans_by_model` and
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
    """Return the accepted drafts, and the records of the rejected ones with the filter's name."""
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


if __name__ == "__main__":
    main()
