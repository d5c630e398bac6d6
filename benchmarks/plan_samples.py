"""Steps replaced or denoised again, and several plans, with a checkpoint of synthetic problems.

`python -m hierbd3lm.benchmarks.plan_samples --model DIR [--limit N] [--num_plans K] [--only PART ...]`. Parts, on the
test split:

- `replan`: a step of the reference plan is replaced; forward passes of [`replan`] and of the whole execution anew.
- `repair`: exact match before and after steps with wrong arithmetic are denoised again, once.
- `plans`: exact match, tokens and forward passes of voting over full samples, and of executions of the best plans.

Writes results/plan_samples_{part}.json and .md, with the suffix `--page`.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hierbd3lm.data.arguments import DataArguments, check_at_least
from hierbd3lm.data.decoding import decode
from hierbd3lm.data.gsm8k.answers import cut_at_stops, match_numeric, match_strict, parse_number
from hierbd3lm.data.splits import load_split
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.plan_swaps import ONE_PART, ChangedPlan, change_plan
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.prompts import Problem, collate_prompts, read_problems
from hierbd3lm.evaluation.repair import repair, replan
from hierbd3lm.evaluation.several_plans import answer_with_plans
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import resolve_settings

from .measure import make_parser, trained_folder, write_results

BATCH_SIZE = 50
TEMPERATURES = (0.0, 1.0)  # of the answers that are repaired
REPAIR_TEMPERATURE = 0.7


class Measurement:
    """The parts of the benchmark, for one checkpoint and one number of test problems."""

    def __init__(
        self, model: HierBD3LMForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, data: DataArguments, n: int
    ):
        self.model, self.tokenizer = model, tokenizer
        self.config = SyntheticConfig(**data.synthetic)
        self.problems = read_problems(load_split(data, "test", n), tokenizer, model.config, plans_are_given=False)

    def batches(self) -> list[list[Problem]]:
        """Return the problems in batches, in their order."""
        return [self.problems[start : start + BATCH_SIZE] for start in range(0, len(self.problems), BATCH_SIZE)]

    def inputs(self, batch: list[Problem]) -> dict[str, torch.Tensor]:
        """Return the encoded questions of a batch."""
        return collate_prompts(batch, self.model.config.pad_token_id)

    def texts(self, rows: torch.Tensor) -> list[str]:
        """Decode the rows of a segment."""
        pad = self.model.config.pad_token_id
        return [
            cut_at_stops(decode([token for token in row if token != pad], self.tokenizer)) for row in rows.tolist()
        ]

    def replan(self) -> list[dict[str, Any]]:
        """Replace a step of reference plans, other than the first."""
        totals: Counter[str] = Counter()
        for batch in self.batches():
            drawn = [
                change_plan(random.Random(p.index), p.question, p.reference_plan, self.config.max_value, (), ONE_PART)
                for p in batch
            ]
            chosen = [(p, change) for p, change in zip(batch, drawn, strict=True) if change and change.steps[0] > 0]
            if chosen:
                totals.update(self.replace_steps(*zip(*chosen, strict=True)))
        n = totals.pop("problems")
        return [{"problems": n} | {name: total / n for name, total in totals.items()}]

    def replace_steps(self, problems: Sequence[Problem], changes: Sequence[ChangedPlan]) -> dict[str, int]:
        """Replace a step of the reference plan of each problem; returns sums over the problems."""
        inputs, plans = self.inputs(list(problems)), self.encode([problem.reference_plan for problem in problems])
        before = self.model.generate(**inputs, plan_ids=plans, stage="execution")
        before.plan = plans
        steps = [change.steps[0] for change in changes]
        lines = [change.plan.split("\n")[step] for change, step in zip(changes, steps, strict=True)]
        after = replan(self.model, self.tokenizer, inputs, before, steps, lines)
        anew = self.model.generate(**inputs, plan_ids=after.plan, stage="execution")
        texts, others = self.texts(after.execution), self.texts(anew.execution)
        answers = [str(change.answer) for change in changes]
        return {
            "problems": len(problems),
            "NFE of replan": int(after.num_forward_passes.sum()),
            "NFE anew": int(anew.num_forward_passes.sum()),
            "same execution as anew": sum(text == other for text, other in zip(texts, others, strict=True)),
            "answer of the changed plan": sum(map(match_strict, texts, answers)),
            "the same anew": sum(map(match_strict, others, answers)),
        }

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Encode texts, right-padded."""
        rows = [torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        pad = self.model.config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def repair(self) -> list[dict[str, Any]]:
        """Repair greedy and sampled answers."""
        rows = []
        for temperature in TEMPERATURES:
            before, after, redone, better, passes, more = [], [], 0, 0, 0, 0
            for number, batch in enumerate(self.batches()):
                inputs = self.inputs(batch)
                output = self.model.generate(**inputs, temperature=temperature, seed=number)
                result = repair(self.model, self.tokenizer, inputs, output, REPAIR_TEMPERATURE, seed=1000 + number)
                before += self.right(batch, self.texts(output.execution))
                after += self.right(batch, [cut_at_stops(decode(ids, self.tokenizer)) for ids in result.executions])
                redone += sum(step is not None for step in result.steps)
                better += sum(result.is_better)
                passes += int(output.num_forward_passes.sum())
                more += sum(result.num_forward_passes)
            n = len(self.problems)
            row = {"temperature": temperature, "exact match before": sum(before) / n, "after": sum(after) / n}
            rows.append(row | {"redone": redone, "replaced": better, "NFE": passes / n, "additional NFE": more / n})
        return rows

    def right(self, batch: list[Problem], executions: list[str]) -> list[bool]:
        """Return whether each execution has the reference answer."""
        return [match_numeric(text, problem.reference_answer) for text, problem in zip(executions, batch, strict=True)]

    def plans(self, num_plans: int) -> list[dict[str, Any]]:
        """Compare voting over full samples with executions of the best plans, as JSON rows."""
        cases: dict[str, dict[str, Any]] = {
            "greedy": {"num_plans": 1, "temperature": 0.0, "ranking": "agreement"},
            f"voting over {num_plans} samples": {"num_plans": num_plans, "ranking": "agreement"},
            f"best of {num_plans} plans": {"num_plans": num_plans},
            f"vote of the best {num_plans // 2} of {num_plans} plans": {
                "num_plans": num_plans,
                "num_executed": num_plans // 2,
            },
            f"best of {num_plans} plans, {num_plans // 2} executions": {
                "num_plans": num_plans,
                "executions_per_plan": num_plans // 2,
            },
        }
        return [{"answers": name} | self.answer(dict(case)) for name, case in cases.items()]

    def answer(self, case: dict[str, Any]) -> dict[str, Any]:
        """Answer all problems in one way."""
        right, passes, tokens = 0, 0, 0
        settings = {"temperature": case.pop("temperature", 1.0)}
        for number, batch in enumerate(self.batches()):
            resolved = resolve_settings(self.model.generation_config, settings | {"seed": number})
            for problem, result in zip(
                batch, answer_with_plans(self.model, self.tokenizer, batch, resolved, **case), strict=True
            ):
                answer = result.answer
                right += answer is not None and answer == parse_number(problem.reference_answer)
                passes, tokens = passes + result.num_forward_passes, tokens + result.num_tokens
        n = len(self.problems)
        return {"exact match": right / n, "NFE": passes / n, "tokens": tokens / n}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def main() -> None:
    """Measure the parts, and write their results."""
    parts = ("replan", "repair", "plans")
    parser = make_parser("plan_samples", __doc__)
    parser.add_argument("--model", required=True, type=trained_folder, help="Folder of a checkpoint.")
    parser.add_argument("--limit", type=int, default=500, help="Number of test problems.")
    parser.add_argument("--num_plans", type=int, default=8, help="Plans, or samples, for a question; at least 2.")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, metavar="PART", help=f"Some of {parts}.")
    parser.add_argument("--page", default="", help="Suffix of the written files.")
    args = parser.parse_args()
    check_at_least("limit", args.limit, 1)
    check_at_least("num_plans", args.num_plans, 2)
    model, tokenizer = load_model(args.model, "cpu")
    measurement = Measurement(model, tokenizer, DataArguments.load(args.model), args.limit)
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "replan": measurement.replan,
        "repair": measurement.repair,
        "plans": lambda: measurement.plans(args.num_plans),
    }
    for part in args.only:
        rows = measures[part]()
        name = "_".join(filter(None, (part, args.page)))
        details = {"arguments": vars(args) | {"only": list(args.only)}, "rows": rows}
        write_results("plan_samples", name, [], details, format_rows(rows))


if __name__ == "__main__":
    main()
