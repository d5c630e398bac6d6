"""Synthetic grade-school problems: `python -m hierbd3lm.data.synthetic.problems [--split SPLIT] [--num-examples N]`.

The quantities of a problem are counts of one thing, one per person. Some are given; each of the others is one
operation on quantities below it (see quantities.py).

    Mia has 3 more apples than Tom. Tom has 5 apples. How many apples does Mia have?    (question)
    Mia = Tom + 3                                                                       (plan)
    Mia = 5 + 3 = 8                                                                     (execution)
    #### 8
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..steps import row_features
from .config import HASH_SPLITS, SPLITS, SyntheticConfig, check_integer, shapes
from .quantities import draw_problem
from .wording import write_row

if TYPE_CHECKING:
    from datasets import Dataset, Features

MAX_DRAWS = 10_000  # of problems, for a new one of the split
MAX_DRAWS_OF_SKELETON = 500  # without a new skeleton, before problems of this shape may differ in their words alone


Shape = tuple[int, int]  # number of steps, depth


@dataclass
class _Drawn:
    """Problems drawn so far for a split.

    Args:
        skeletons, questions: those of the problems.
        exhausted: shapes without a new skeleton in many consecutive draws: their problems may differ in words alone.
    """

    skeletons: set[str] = field(default_factory=set)
    questions: set[str] = field(default_factory=set)
    exhausted: set[Shape] = field(default_factory=set)


def generate_problem(rng: random.Random, config: SyntheticConfig) -> dict:
    """Draw one row of the training distribution, of any skeleton (see [`generate_dataset`] for the columns)."""
    problem = draw_problem(rng, *_draw_shape(rng, shapes("train", config)), config)
    return write_row(rng, problem, problem.skeleton(), config)


def generate_problems(split: str, num_examples: int, config: SyntheticConfig) -> Iterator[dict]:
    """Yield the rows of [`generate_dataset`]; fewer rows are the first ones of more."""
    by_steps = shapes(split, config)
    check_integer("num_examples", num_examples, 1, None)
    rng, drawn = random.Random(f"synthetic {config.seed} {split}"), _Drawn()
    for _ in range(num_examples):
        row = _draw_new_row(rng, split, _draw_shape(rng, by_steps), config, drawn)
        if split != "train":
            drawn.skeletons.add(row["skeleton"])
            drawn.questions.add(row["question"])
        yield row


def generate_dataset(split: str, num_examples: int, config: SyntheticConfig | None = None) -> "Dataset":
    """Draw a split: the same rows for the same `config.seed` and `split`, in every process.

    No two splits share a skeleton. No two rows of a split other than `train` share a question; they share a skeleton
    only if nearly all skeletons of their shape have been drawn. Columns:
    `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`; `plan_steps`, `execution_steps` (the steps,
    layer by layer, within a layer as the question states them), `depends_on` (for each step the earlier steps that it
    uses, counted from 0), `num_steps`, `depth`, `skeleton` (its hash).

    Raises:
        ValueError: for an invalid `split` or `num_examples`, and if the split has no more different problems.
    """
    from datasets import Dataset

    rows = list(generate_problems(split, num_examples, SyntheticConfig() if config is None else config))
    return Dataset.from_list(rows, features=_features())


def _draw_shape(rng: random.Random, by_steps: dict[int, list[int]]) -> Shape:
    num_steps = rng.choice(list(by_steps))
    return num_steps, rng.choice(by_steps[num_steps])


def _draw_new_row(
    rng: random.Random, split: str, shape: Shape, config: SyntheticConfig, drawn: "_Drawn"
) -> dict[str, Any]:
    """Draw problems of one shape until one is in the split and new to it: another skeleton, or other words."""
    for draw in range(MAX_DRAWS):
        if draw == MAX_DRAWS_OF_SKELETON:
            drawn.exhausted.add(shape)
        problem = draw_problem(rng, *shape, config)
        skeleton = problem.skeleton()
        if split in HASH_SPLITS and int(skeleton, 16) % 100 not in HASH_SPLITS[split]:
            continue
        if skeleton in drawn.skeletons and shape not in drawn.exhausted:
            continue
        row = write_row(rng, problem, skeleton, config)
        if row["question"] not in drawn.questions:
            return row
    num_steps, depth = shape
    raise ValueError(
        f"`num_examples` is more than split {split!r} has: after {len(drawn.questions)} different problems, "
        f"{MAX_DRAWS} draws of {num_steps} steps and depth {depth} gave no new one. Ask for fewer, or raise "
        f"`num_steps`, `max_value` or `num_names`"
    )


def _features() -> "Features":
    from datasets import Features, Value

    return Features(
        {**row_features(), "num_steps": Value("int64"), "depth": Value("int64"), "skeleton": Value("string")}
    )


# The command line


def main(argv: Sequence[str] | None = None) -> None:
    """Print problems as JSON lines."""
    defaults = SyntheticConfig()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num-examples", type=int, default=5)
    for name in ("num_steps", "num_distractors"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, nargs=2, metavar=("LEAST", "MOST"), default=getattr(defaults, name))
    for name in ("depth", "max_value", "num_names", "num_things", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    fields = vars(parser.parse_args(argv))
    split, num_examples = fields.pop("split"), fields.pop("num_examples")
    for row in generate_problems(split, num_examples, SyntheticConfig(**fields)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
