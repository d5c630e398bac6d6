"""Synthetic grade-school problems and their splits.

Mia has 3 more apples than Tom. Tom has 5 apples. How many apples does Mia have?    (question)
Mia = Tom + 3                                                                       (plan)
Mia = 5 + 3 = 8                                                                     (execution)
#### 8
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset, Features, List, Value

from ..steps import STEP_SEPARATOR
from .graphs import MAX_WIDTH, SYMBOLS, draw_problem, min_depth
from .wording import NAMES, PHRASINGS, THINGS, TOTAL, write_row

# Splits by the skeleton's hash modulo 100.
HASH_SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
SPLITS = (*HASH_SPLITS, "ood_longer", "ood_wider")
MAX_DRAWS = 10_000  # attempts to draw a problem that is new to its split
MAX_DRAWS_OF_SKELETON = 500  # attempts to draw a new skeleton; after these a new wording is enough

FEATURES = Features(
    {
        "question": Value("string"),
        "plan": Value("string"),
        "execution": Value("string"),
        "answer": Value("string"),
        "plan_steps": List(Value("string")),
        "execution_steps": List(Value("string")),
        "dependencies": List(List(Value("int64"))),
        "num_steps": Value("int64"),
        "depth": Value("int64"),
        "skeleton": Value("string"),
    }
)


@dataclass(frozen=True)
class SyntheticConfig:
    """Configuration of the training problems, from which the other splits are derived (see [`shapes`]).

    Args:
        num_steps (pair of `int`): minimum and maximum number of operations for the answer, drawn uniformly.
        depth (`int`, *optional*):
            number of operations on the longest chain. If omitted, drawn uniformly from the depths that the number of
            steps allows: from steps / 4 (at least 2 for 2 or more steps) to the number of steps.
        max_depth (`int`, *optional*): maximum number of operations on the longest chain, if `depth` is omitted.
        num_distractors (pair of `int`):
            minimum and maximum number of people that the answer does not depend on, drawn uniformly.
        max_value (`int`): every given, stated and computed number is an integer in [1, max_value]; at least 10.
        num_names, num_things (`int`): number of entries of `NAMES` and `THINGS` to use.
        seed (`int`): random seed.

    Raises:
        ValueError: for a value out of its range.
    """

    num_steps: tuple[int, int] = (1, 3)
    depth: int | None = None
    max_depth: int | None = None
    num_distractors: tuple[int, int] = (0, 1)
    max_value: int = 100
    num_names: int = 24
    num_things: int = 8
    seed: int = 0

    def __post_init__(self):
        for name, low in (("num_steps", 1), ("num_distractors", 0)):
            object.__setattr__(self, name, _check_pair(name, getattr(self, name), low))
        (fewest, most), most_distractors = self.num_steps, self.num_distractors[1]
        if self.depth is not None:
            shallowest = min_depth(most)
            if shallowest > fewest:
                raise ValueError(
                    f"`depth` must be None for num_steps={self.num_steps}, as no depth fits all of them, but got "
                    f"{self.depth}"
                )
            _check_integer("depth", self.depth, shallowest, fewest)
        if self.max_depth is not None:
            if self.depth is not None:
                raise ValueError(f"`max_depth` must be None with depth={self.depth}, but got {self.max_depth}")
            _check_integer("max_depth", self.max_depth, min_depth(most), None)
        _check_integer("max_value", self.max_value, 10, None)
        _check_integer("num_names", self.num_names, _names_needed(most, most_distractors), len(NAMES))
        _check_integer("num_things", self.num_things, 1, len(THINGS))
        _check_integer("seed", self.seed, None, None)


def shapes(split: str, config: SyntheticConfig) -> dict[int, list[int]]:
    """Return the depths of a split's problems by number of steps. Steps are drawn uniformly, then the depth.

    - `train`, `validation`, `test`: as configured; a problem's skeleton determines its split.
    - `ood_longer`: one or two steps more than the longest training problem, and not wider (steps / depth) than the
      widest one.
    - `ood_wider`: wider than the widest training problem, up to 4, at the minimum depth of training (at least 2).

    Raises:
        ValueError: for an unknown split, for `ood_wider` if training has the maximum width, and for a split that needs
            more names than configured.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, but got {split!r}")
    fewest, most = config.num_steps
    by_steps = {steps: _depths(steps, config) for steps in range(fewest, most + 1)}
    widest = max(steps / depths[0] for steps, depths in by_steps.items())
    if split == "ood_longer":
        longer = (most + 1, most + 2)
        by_steps = {steps: [d for d in range(min_depth(steps), steps + 1) if steps / d <= widest] for steps in longer}
    if split == "ood_wider":
        depth = max(2, min(depths[0] for depths in by_steps.values()))
        by_steps = {steps: [depth] for steps in range(depth, MAX_WIDTH * depth + 1) if steps / depth > widest}
        if not by_steps:
            raise ValueError(
                f"`split` must not be 'ood_wider' for num_steps={config.num_steps}: it needs training problems below "
                f"steps / depth = {MAX_WIDTH}"
            )
    needed = _names_needed(max(by_steps), config.num_distractors[1])
    if needed > config.num_names:
        raise ValueError(f"`num_names` must be at least {needed} for split {split!r}, but got {config.num_names}")
    return by_steps


def generate_problems(split: str, num_examples: int, config: SyntheticConfig) -> Iterator[dict]:
    """Yield the rows of [`generate_dataset`]; the rows for a smaller `num_examples` are a prefix."""
    by_steps = shapes(split, config)
    _check_integer("num_examples", num_examples, 1, None)
    rng, skeletons, questions = random.Random(f"synthetic {config.seed} {split}"), set(), set()
    for _ in range(num_examples):
        row = _draw_new_row(rng, split, *_draw_shape(rng, by_steps), config, skeletons, questions)
        if split != "train":
            skeletons.add(row["skeleton"])
            questions.add(row["question"])
        yield row


def generate_dataset(split: str, num_examples: int, config: SyntheticConfig | None = None) -> Dataset:
    """Generate a split: the same rows for the same `config.seed` and `split`, in every process.

    Splits have no skeleton in common. In splits other than `train`, all questions are different, and a skeleton is
    repeated only if hardly any new skeleton of its shape is left. Columns:
    `question`, `plan`, `execution` (ends with `#### <answer>`), `answer`; `plan_steps`, `execution_steps` (the steps,
    ordered by layer, then as in the question), `dependencies` (for each step the indices of the earlier steps that it
    uses), `num_steps`, `depth`, `skeleton` (a hash).

    Raises:
        ValueError: for an invalid `split` or `num_examples`, and if the split has too few different problems.
    """
    rows = list(generate_problems(split, num_examples, SyntheticConfig() if config is None else config))
    return Dataset.from_list(rows, features=FEATURES)


def vocabulary_texts(config: SyntheticConfig) -> list[str]:
    """Return texts with every word of every split, at the start of a text and after a space, for a tokenizer."""
    names = NAMES[: config.num_names]
    words = {"name": names[0], "number": 1, "others": f"{names[0]}, {names[0]} and {names[0]}", "things": THINGS[0]}
    sentences = [
        phrasing.format(plural=THINGS[0], times=times, **words)
        for phrasing in sum(PHRASINGS.values(), ())
        for times in ("twice", "1 times")
    ]
    counted = [f"1 {thing[:-1]} 1 {thing}" for thing in THINGS[: config.num_things]]
    steps = [f"{name} = {name} {symbol} 1" for name in (*names, TOTAL) for symbol in SYMBOLS.values()]
    return [*sentences, *(f" {sentence}" for sentence in sentences), *counted, *steps, f"{STEP_SEPARATOR}####"]


def _depths(num_steps: int, config: SyntheticConfig) -> list[int]:
    if config.depth is not None:
        return [config.depth]
    deepest = num_steps if config.max_depth is None else min(num_steps, config.max_depth)
    return list(range(min_depth(num_steps), deepest + 1))


def _names_needed(num_steps: int, num_distractors: int) -> int:
    return num_steps + 2 + num_distractors  # two given people are enough for any graph


def _draw_shape(rng: random.Random, by_steps: dict[int, list[int]]) -> tuple[int, int]:
    num_steps = rng.choice(list(by_steps))
    return num_steps, rng.choice(by_steps[num_steps])


def _draw_new_row(
    rng: random.Random,
    split: str,
    num_steps: int,
    depth: int,
    config: SyntheticConfig,
    skeletons: set[str],
    questions: set[str],
) -> dict:
    """Draw problems of one shape until one belongs to the split and is new to it, by skeleton or by wording."""
    for draw in range(MAX_DRAWS):
        num_distractors = rng.randint(*config.num_distractors)
        problem = draw_problem(rng, num_steps, depth, num_distractors, config.num_names, config.max_value)
        skeleton = problem.skeleton()
        if split in HASH_SPLITS and int(skeleton, 16) % 100 not in HASH_SPLITS[split]:
            continue
        if skeleton in skeletons and draw < MAX_DRAWS_OF_SKELETON:
            continue
        row = write_row(rng, problem, skeleton, config.num_names, config.num_things)
        if row["question"] not in questions:
            return row
    raise ValueError(
        f"`num_examples` must not exceed the number of different problems of split {split!r}: after {len(questions)} "
        f"problems, {MAX_DRAWS} draws of {num_steps} steps and depth {depth} gave no new one. Reduce `num_examples`, "
        f"or increase `num_steps`, `max_value` or `num_names`"
    )


def _check_integer(name: str, value: object, low: int | None, high: int | None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):
        accepted = "" if low is None else f" >= {low}" if high is None else f" in [{low}, {high}]"
        raise ValueError(f"`{name}` must be an integer{accepted}, but got {value!r}")


def _check_pair(name: str, value: object, low: int) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"`{name}` must be two integers, minimum and maximum, but got {value!r}")
    _check_integer(f"{name}[0]", value[0], low, None)
    _check_integer(f"{name}[1]", value[1], value[0], None)
    return tuple(value)


def main() -> None:
    """Print problems as JSON lines."""
    defaults = SyntheticConfig()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num-examples", type=int, default=5)
    for name in ("num_steps", "num_distractors"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, nargs=2, metavar=("MIN", "MAX"), default=getattr(defaults, name))
    for name in ("depth", "max_value", "num_names", "num_things", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    fields = vars(parser.parse_args())
    split, num_examples = fields.pop("split"), fields.pop("num_examples")
    for row in generate_problems(split, num_examples, SyntheticConfig(**fields)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
