"""Evaluation run: a model answers reasoning problems, and the answers are scored.

The folder of a run holds `settings.json`, `predictions.jsonl` (a line per example and sample, appended batch by batch)
and at the end `summary.json`. An interrupted run resumes from its predictions.
"""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..data import run_folder
from ..data.decoding import count_lost_answers, decode
from ..denoising_hierbd3lm import HierBD3LMGenerationOutput
from ..generation_hierbd3lm import order_of, segment_limits
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings, settings_of
from .arguments import EvaluationArguments
from .checkpoints import describe_model, describe_run, load_examples, load_model
from .given_plans import with_given_plans
from .prompts import Problem, Prompt, collate_prompts, make_batches, read_problems
from .scoring import score, summarize

if TYPE_CHECKING:
    from .several_plans import PlanChoice

SETTINGS_FILE, PREDICTIONS_FILE, SUMMARY_FILE = "settings.json", "predictions.jsonl", "summary.json"


@dataclass(frozen=True)
class Written:
    """Answer to one prompt: content tokens of both segments; for the other fields see `HierBD3LMGenerationOutput`."""

    plan_ids: list[int]
    execution_ids: list[int]
    finished: bool
    num_forward_passes: int
    tokens_per_forward: float
    reveal_steps: list[int]
    plan_followed: bool | None = None

    @property
    def num_tokens(self) -> int:
        """Number of denoised tokens."""
        return len(self.reveal_steps)


def evaluate(args: EvaluationArguments) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluate a checkpoint, or resume the evaluation; returns the predictions and the summary."""
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.attn_implementation)
    settings = resolve_settings(model.generation_config, args.generation_settings())
    segment_limits(model.config, order_of(model, settings), settings)
    from .several_plans import PlanChoice, check_plans  # which imports this module

    plans = None if args.num_plans is None else PlanChoice(**args.plan_choice())
    check_samples(args.num_samples, settings)
    data_args, dataset = load_examples(args)
    if args.given_plan is not None:
        dataset = with_given_plans(dataset, args.given_plan, args.num_samples)
    described = describe_run(args, data_args, dataset, model) | {"num_samples": args.num_samples}
    if plans is not None:
        check_plans(settings=settings, **vars(plans))
        described |= vars(plans)
    start_run(args.output_dir, described | settings_of(settings), args.overwrite)
    num_lost = count_lost_answers(dataset["execution"], tokenizer)
    run = args.output_dir, args.batch_size, args.num_samples, plans
    predictions = predict(model, tokenizer, dataset, settings, *run)
    summary = summarize(predictions) | {
        "num_lost_references": num_lost,
        "model": args.model,
        "dataset": data_args.dataset,
        "split": args.split,
        "given_plan": args.given_plan,
        "seed": args.seed,
        "settings": settings_of(settings),
        "batch_size": args.batch_size,
        "device": str(model.device),
    }
    summary |= describe_model(model)
    run_folder.write_json(Path(args.output_dir, SUMMARY_FILE), summary)
    return predictions, summary


def start_run(folder: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Create the folder of a run, or check that it holds the run with these settings.

    Raises:
        ValueError: if the folder holds another run.
    """
    run_folder.start_run(Path(folder), settings, SETTINGS_FILE, (PREDICTIONS_FILE, SUMMARY_FILE), overwrite)


def predict(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    settings: HierBD3LMGenerationConfig,
    folder: str | os.PathLike,
    batch_size: int = 32,
    num_samples: int = 1,
    plans: "PlanChoice | None" = None,
) -> list[dict[str, Any]]:
    """Answer every problem of a dataset, except those already answered in `folder`.

    Args:
        dataset: dataset with the columns `question`, `execution`, which ends with `#### <answer>`, and optionally
            `plan`.
        settings: generation settings. `stage="execution"` uses the plans of [`with_given_plans`]. The seed of each
            batch is derived from the given one.
        folder: folder of the run; see [`start_run`].
        batch_size: batch size. Problems are grouped by length.
        num_samples: answers per problem, each with its own plan unless plans are given.
        plans: write several plans for each problem, and execute the best; `num_samples` follows from it.

    Returns:
        the lines of `predictions.jsonl` (see [`score`]), in the order of the dataset, with the samples of a problem
        next to each other.

    Raises:
        ValueError: if several samples are requested at temperature 0, and as in [`read_problems`].
    """
    if plans is not None:
        num_samples = plans.num_samples
    from .several_plans import answer_problems  # which imports this module

    check_samples(num_samples, settings)
    problems = read_problems(dataset, tokenizer, model.config, settings.stage == "execution", num_samples)
    path, first_samples = Path(folder, PREDICTIONS_FILE), range(0, len(problems), num_samples)
    # one pass over all problems per sample
    batches = chain.from_iterable(
        make_batches(problems[sample::num_samples], batch_size) for sample in range(1 if plans else num_samples)
    )
    samples = {problems[start].index: problems[start : start + num_samples] for start in first_samples}
    seeds = random.Random(settings.seed)
    with tqdm(total=len(problems), desc="Evaluating", unit="example") as progress, run_folder.Log(path) as log:
        predictions = {_key(prediction): prediction for prediction in log.records}
        for batch in batches:
            # An incomplete batch is answered again as a whole, so that a resumed run draws the same random numbers.
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            groups = [samples[problem.index] if plans else [problem] for problem in batch]
            if any(problem.key not in predictions for group in groups for problem in group):
                if plans is None:
                    answers = answer_batch(model, tokenizer, batch, batch_settings)
                else:
                    answers = answer_problems(model, tokenizer, groups, batch_settings, plans)
                predictions |= {_key(answer): answer for answer in answers}
                log.append(*answers)
            progress.update(sum(map(len, groups)))
        unanswered = [score(problem, "", "") for problem in problems if not problem.is_answered]
        progress.update(len(unanswered))
    predictions |= {_key(prediction): prediction for prediction in unanswered}
    ordered = [predictions[problem.key] for problem in problems]
    run_folder.write_lines(path, ordered)
    return ordered


def check_samples(num_samples: int, settings: HierBD3LMGenerationConfig) -> None:
    """Raise a ValueError for several samples at temperature 0, which would all be the same."""
    if num_samples > 1 and settings.temperature == 0:
        raise ValueError(
            f"`temperature` must be > 0 for num_samples={num_samples}, but got {settings.temperature}: greedy samples "
            f"are all the same"
        )


def answer_batch(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: HierBD3LMGenerationConfig,
) -> list[dict[str, Any]]:
    """Generate and score the answers to a batch of problems."""
    start = time.perf_counter()
    batch = generate_batch(model, problems, settings, tokenizer=tokenizer)
    seconds = (time.perf_counter() - start) / len(problems)
    pairs = zip(problems, batch, strict=True)
    return [score_written(problem, written, tokenizer, seconds) for problem, written in pairs]


def score_written(
    problem: Problem,
    written: Written,
    tokenizer: PreTrainedTokenizerBase,
    seconds: float,
    more_passes: int = 0,
    more_tokens: int = 0,
) -> dict[str, Any]:
    """Score an answer as it was generated; see [`score`].

    Args:
        more_passes, more_tokens: costs of what is not part of the answer, such as other plans.
    """
    num_passes = written.num_forward_passes + more_passes
    num_tokens = written.num_tokens + more_tokens
    costs = {
        "finished": written.finished,
        "num_forward_passes": num_passes,
        "num_tokens": num_tokens,
        "num_plan_tokens": len(written.plan_ids),
        "num_execution_tokens": len(written.execution_ids),
        "tokens_per_forward": num_tokens / num_passes if more_passes else written.tokens_per_forward,
        "seconds": seconds,
        "plan_followed": written.plan_followed,
    }
    texts = (decode(ids, tokenizer) for ids in (written.plan_ids, written.execution_ids))
    return score(problem, *texts, **costs)


def generate_batch(
    model: HierBD3LMForBlockDiffusion,
    prompts: Sequence[Prompt],
    settings: HierBD3LMGenerationConfig,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_answers: int = 1,
) -> list[Written]:
    """Generate so many answers to each prompt; `tokenizer` reads the plans of `execution_order="plan"`."""
    pad = model.config.pad_token_id
    prompt = {name: ids.to(model.device) for name, ids in collate_prompts(prompts, pad).items()}
    others = {"streamer": streamer, "tokenizer": tokenizer, "num_return_sequences": num_answers}
    return read_output(model.generate(**prompt, generation_config=settings, **others), pad)


def read_output(output: HierBD3LMGenerationOutput, pad: int) -> list[Written]:
    """Return the answer of each row of an output."""
    plans, executions, steps, *others = (  # copied to the CPU, which waits for the device, so that timings are right
        getattr(output, name).tolist()
        for name in ("plan", "execution", "reveal_steps", "finished", "num_forward_passes", "tokens_per_forward")
    )
    plans, executions = ([[token for token in row if token != pad] for row in rows] for rows in (plans, executions))
    steps = [[step for step in row if step] for row in steps]
    followed = [None] * len(plans) if output.plan_followed is None else output.plan_followed.tolist()
    return [Written(*row) for row in zip(plans, executions, *others, steps, followed, strict=True)]


def _key(prediction: dict[str, Any]) -> tuple[int, int]:
    return prediction["index"], prediction["sample"]
