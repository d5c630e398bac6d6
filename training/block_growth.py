"""Block sizes that change during a training run."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
import yaml
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..configuration_hierbd3lm import HierBD3LMConfig, has_one_block_size
from ..data.collator import IGNORED_LABEL, HierarchicalDataCollator
from ..masking_hierbd3lm import PADDING, QUESTION, SEGMENT_NAMES
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..order_hierbd3lm import BlockOrder

NAME = "block_size_schedule"
EXAMPLE = "{0: 1, 0.4: 2, 0.6: 4}"
Batch = dict[str, torch.Tensor]

logger = logging.get_logger(__name__)


def read_schedule(value: Mapping[Any, Any] | str | None) -> dict[int | float, int] | None:
    """Return a schedule as a mapping from starts to block sizes, or None.

    Args:
        value: a mapping, or its text as YAML or JSON (`null` is None). A start is a step (an integer >= 0) or a
            fraction of the run (a number below 1); one of them is 0.

    Raises:
        ValueError: if a start or a block size is out of its range, or a block size does not divide the largest one.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"`{NAME}` must be a mapping such as {EXAMPLE}, but got {value!r}") from error
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"`{NAME}` must be a mapping such as {EXAMPLE}, but got {value!r}")
    schedule = {_read_start(start): size for start, size in value.items()}
    for size in schedule.values():
        if not _is_integer(size) or size < 1:
            raise ValueError(f"`{NAME}` must have block sizes >= 1, but got {size!r} in {value}")
    largest = max(schedule.values())
    for size in schedule.values():
        if largest % size:
            raise ValueError(f"`{NAME}` must have block sizes that divide the largest, {largest}, but got {size}")
    if 0 not in schedule:
        raise ValueError(f"`{NAME}` must have the block size of step 0, but got {value}")
    return schedule


def _read_start(start: Any) -> int | float:
    if isinstance(start, str):  # a key of JSON
        start = yaml.safe_load(start)
    is_step = _is_integer(start) and start >= 0
    if not is_step and not (isinstance(start, float) and 0 <= start < 1):
        raise ValueError(
            f"`{NAME}` must have starts that are steps (integers >= 0) or fractions of the run in [0, 1), but got "
            f"{start!r}"
        )
    return start


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def resolve_schedule(schedule: Mapping[int | float, int], max_steps: int) -> list[tuple[int, int]]:
    """Return the first step and the block size of each stage of a run, in order.

    In a very short run several fractions may be the same step, at which the last of them counts.

    Raises:
        ValueError: if a stage starts after the run's last step.
    """
    stages: dict[int, int] = {}
    for start, size in schedule.items():
        step = start if isinstance(start, int) else int(start * max_steps + 1e-6)  # 0.29 * 100 is 28.999...
        if step >= max_steps:
            raise ValueError(f"`{NAME}` must have starts below the run's {max_steps} steps, but got {start}")
        if step in stages:
            logger.warning(f"The run has no steps with block size {stages[step]}, as it has only {max_steps} steps.")
        stages[step] = size
    return sorted(stages.items())


def size_at(stages: list[tuple[int, int]], step: int) -> int:
    """Return the block size of the update from `step` to `step + 1`."""
    return next(size for start, size in reversed(stages) if start <= step)


def resized(config: HierBD3LMConfig, block_size: int) -> HierBD3LMConfig:
    """Return a copy of a configuration with another block size, of plan and execution."""
    config = copy(config)
    config.plan_block_size = config.execution_block_size = block_size
    return config


def resize_blocks(model: nn.Module, block_size: int) -> None:
    """Set the block size of plan and execution of a model, which may be wrapped."""
    for module in model.modules():
        if isinstance(module, HierBD3LMForBlockDiffusion):
            module.config.plan_block_size = module.config.execution_block_size = block_size
            module.order = BlockOrder.from_config(module.config)


def check_schedule(schedule: Mapping[int | float, int], config: HierBD3LMConfig, collator: Any) -> None:
    """Raise a ValueError if a model or a collator cannot have the block sizes of a schedule."""
    if has_one_block_size(config.to_dict()):
        raise ValueError(
            f"`{NAME}` must be None for a model with one possible block size (mdlm, sedd, ar, joint), but got "
            f"{dict(schedule)}"
        )
    largest = max(schedule.values())
    order = BlockOrder.from_config(config)
    for number, part in enumerate(order.parts):
        names = " + ".join(f"{SEGMENT_NAMES[segment]}_len" for segment in part.segments)
        names = "step_len" if order.follows_plan and number else names
        if part.max_len % largest:
            raise ValueError(
                f"`{NAME}` must have a largest block size that divides {names}={part.max_len}, but got {largest}"
            )
    if not isinstance(collator, HierarchicalDataCollator):
        raise ValueError(
            f"`data_collator` must be a HierarchicalDataCollator with `{NAME}`, but got {type(collator).__name__}"
        )


def lay_out_blocks(batch: Batch, order: BlockOrder, keep_columns: bool = False) -> Batch:
    """Lay out a batch for blocks that are smaller than those that it is laid out for.

    Batches are collated ahead of their step, possibly by worker processes. They are collated for the largest block
    size. This function removes the `<|end|>` tokens that a smaller one does not need.

    Args:
        batch: what [`HierarchicalDataCollator`] returns for block sizes that those of `order` divide.
        keep_columns: replace the removed tokens by padding, as segments have fixed lengths.

    Returns:
        the batch that the collator returns for the block sizes of `order`.
    """
    input_ids, segment_ids = batch["input_ids"], batch["segment_ids"]
    is_end = input_ids == order.end_token_id
    # the first `<|end|>` of a plan that is given has no label either, but it is no filler
    is_filler = (batch["labels"] == IGNORED_LABEL) & is_end & is_end.roll(1, dims=1)
    removed = torch.zeros_like(is_filler)
    for part, inside in zip(order.parts, order.members(segment_ids, input_ids), strict=True):
        needed = (inside & ~is_filler).sum(dim=1, keepdim=True)
        filled = needed + -needed % part.block_size
        removed |= inside & (inside.cumsum(dim=1) > filled)
    batch = batch | {
        "input_ids": input_ids.masked_fill(removed, order.pad_token_id),
        "segment_ids": segment_ids.masked_fill(removed, PADDING),
    }
    if "is_given" in batch:
        batch["is_given"] = batch["is_given"] & ~removed
    orders = {name: batch.pop(name) for name in ("sees",) if name in batch}
    if not keep_columns:
        batch = _pad_on_the_right(batch)
    batch["block_ids"], batch["position_ids"] = order.layout(batch["segment_ids"], batch["input_ids"])
    return batch | orders


def _pad_on_the_right(batch: Batch) -> Batch:
    """Move the padding of plan and execution to the end of each row, and remove columns without a token."""
    is_padding = batch["segment_ids"] == PADDING
    is_answer = (batch["segment_ids"] > QUESTION).cumsum(dim=1) > 0
    moved = is_padding & is_answer
    columns = moved.long().argsort(dim=1, stable=True)
    num_columns = int((~moved).sum(dim=1).max())
    return {name: ids.gather(1, columns)[:, :num_columns] for name, ids in batch.items()}


class BlockGrowth(TrainerCallback):
    """Set the block size of each step.

    Args:
        schedule: see [`read_schedule`].
        resize: function that sets the block size.
    """

    def __init__(self, schedule: Mapping[int | float, int], resize: Callable[[int], None]):
        self.schedule, self.resize = dict(schedule), resize
        self.stages: list[tuple[int, int]] = []
        self.block_size = schedule[0]
        self.checkpoint_block_size: int | None = None  # of the checkpoint that training resumes from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the stages of the run, and set the block size that the checkpoint has if training is resumed."""
        self.stages = resolve_schedule(self.schedule, state.max_steps)
        logger.info("Block sizes: " + ", ".join(f"{size} from step {step}" for step, size in self.stages))
        before = size_at(self.stages, max(state.global_step - 1, 0))
        if state.global_step and self.checkpoint_block_size not in (None, before):
            raise ValueError(
                f"`{NAME}` must have block size {self.checkpoint_block_size} before step {state.global_step}, as the "
                f"checkpoint has it, but got {self.schedule}, which has {before} there in a run of {state.max_steps} "
                f"steps"
            )
        self._set(before)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set(size_at(self.stages, state.global_step))

    def _set(self, block_size: int) -> None:
        if block_size != self.block_size:
            self.block_size = block_size
            self.resize(block_size)
