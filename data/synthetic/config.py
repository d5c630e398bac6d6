"""Settings of the synthetic problems, and the shapes of the problems in each split."""

import math
from dataclasses import dataclass

from .vocabulary import NAMES, THINGS

MAX_WIDTH = 4  # steps / depth

# The splits that a skeleton's hash chooses between: the hundredths of the hashes that are theirs.
HASH_SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
SPLITS = (*HASH_SPLITS, "ood_longer", "ood_wider")


@dataclass(frozen=True)
class SyntheticConfig:
    """Distribution of the training problems, from which the other splits are derived (see [`shapes`]).

    Args:
        num_steps (pair of `int`): minimum and maximum number of operations that the answer needs; drawn uniformly.
        depth (`int`, *optional*):
            number of operations on the longest chain. If omitted, drawn uniformly from all values that the number of
            steps allows: from steps / 4 (at least 2 for 2 or more steps) to the number of steps.
        max_depth (`int`, *optional*): maximum depth if `depth` is omitted.
        num_distractors (pair of `int`): minimum and maximum number of people that the answer does not need; drawn
            uniformly.
        max_value (`int`): every given, stated and computed number is an integer in [1, max_value]; at least 10.
        num_names, num_things (`int`): number of `NAMES` and `THINGS` in use.
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
                raise ValueError(f"`depth` must be None for num_steps={self.num_steps}, which no one depth fits")
            check_integer("depth", self.depth, shallowest, fewest)
        if self.max_depth is not None:
            if self.depth is not None:
                raise ValueError(f"`max_depth` must be None with depth={self.depth}, but got {self.max_depth}")
            check_integer("max_depth", self.max_depth, min_depth(most), None)
        check_integer("max_value", self.max_value, 10, None)
        check_integer("num_names", self.num_names, _names_needed(most, most_distractors), len(NAMES))
        check_integer("num_things", self.num_things, 1, len(THINGS))
        check_integer("seed", self.seed, None, None)


def min_depth(num_steps: int) -> int:
    """Return the minimum depth of a problem: at least 2 for several steps, as all of them lead to one last step."""
    return 1 if num_steps == 1 else max(2, math.ceil(num_steps / MAX_WIDTH))


def shapes(split: str, config: SyntheticConfig) -> dict[int, list[int]]:
    """Return the depths of the problems of a split, by number of steps. Both are drawn uniformly, steps first.

    - `train`, `validation`, `test`: those of the configuration; the skeleton of a problem determines its split.
    - `ood_longer`: one or two steps more than the longest training problem, no wider (steps / depth) than the widest.
    - `ood_wider`: wider than the widest training problem, up to 4; at the minimum depth of training, but at least 2.

    Raises:
        ValueError: for an unknown split, one that cannot exist (training has the maximum width), or one that needs
            more names than the configuration has.
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
            raise ValueError(f"`split` 'ood_wider' needs training problems below steps / depth = {MAX_WIDTH}")
    needed = _names_needed(max(by_steps), config.num_distractors[1])
    if needed > config.num_names:
        raise ValueError(f"`num_names` must be at least {needed} for split {split!r}, but got {config.num_names}")
    return by_steps


def check_integer(name: str, value: object, low: int | None, high: int | None) -> None:
    """Raise a ValueError for a value that is not an integer in [low, high]; None is no bound."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):
        accepted = "" if low is None else f" >= {low}" if high is None else f" in [{low}, {high}]"
        raise ValueError(f"`{name}` must be an integer{accepted}, but got {value!r}")


def _depths(num_steps: int, config: SyntheticConfig) -> list[int]:
    if config.depth is not None:
        return [config.depth]
    deepest = num_steps if config.max_depth is None else min(num_steps, config.max_depth)
    return list(range(min_depth(num_steps), deepest + 1))


def _names_needed(num_steps: int, num_distractors: int) -> int:
    return num_steps + 2 + num_distractors  # two given people are enough for any graph


def _check_pair(name: str, value: object, low: int) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"`{name}` must be two integers, least and most, but got {value!r}")
    check_integer(f"{name}[0]", value[0], low, None)
    check_integer(f"{name}[1]", value[1], value[0], None)
    return tuple(value)
