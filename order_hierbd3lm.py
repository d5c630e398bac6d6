"""The order over blocks: which block a token belongs to, what a block may depend on and when it is denoised.

A [`BlockOrder`] is made once from a configuration. Collator, mask, objective and denoiser read it. Where each row has
an order of its own, its plan gives it: [`parse_plan`] reads which steps a step refers to.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .masking_hierbd3lm import EXECUTION, PADDING, PLAN, QUESTION

TOKEN_IDS = tuple(f"{role}_token_id" for role in ("mask", "plan", "execution", "end", "pad"))
NUMBERED_STEP = re.compile(r"([0-9]+)[.):]\s+(.*)")
NAMED_STEP = re.compile(r"(\w+)\s*=\s*(.+)")

DependsOn = Sequence[Sequence[int]]  # for each step the earlier steps that it needs, counted from 0
PlanParser = Callable[[str], DependsOn | None]  # None, or a ValueError, for a plan that it cannot parse


@dataclass(frozen=True)
class Part:
    """A run of blocks of one size. It starts with an opener and ends with an `<|end|>` or at its greatest length.

    Args:
        segments: ids of the segments that it holds, in order. In a part of plan and execution `<|execution|>` is
            predicted like any token, and only an `<|end|>` after it ends the part.
        block_size: tokens that are denoised together.
        max_len: greatest number of tokens.
        opener_token_id: first token of the part, which is given; None if the part has no opener.
        after: numbers of the parts that it depends on. It sees their blocks and those that they depend on.
    """

    segments: tuple[int, ...]
    block_size: int
    max_len: int
    opener_token_id: int | None
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockOrder:
    """The order over the blocks that follow the question.

    Blocks have ranks: 0 is the question, 1, 2, ... number the blocks of all parts along the sequence. In a causal
    question every token is a block; their ranks end with -2, as -1 stands for padding.

    Args:
        parts: the parts in the order of the sequence.
        mask_token_id, plan_token_id, execution_token_id, end_token_id, pad_token_id: see `HierBD3LMConfig`.
        is_aligned: the i-th blocks of all parts are one block: they have one rank and see each other.
        is_joint: all blocks share one noise level and are denoised at the same time; a block sees the noisy tokens
            of those that it depends on.
        is_shifted: a token is predicted at the token before it, not in its own place: inside a block at the noisy
            one, for the first token of a block at the clean one. All parts have openers.
        has_causal_question: a token of the question sees those before it only.
        is_autoregressive: the backbone is a causal language model, which predicts all tokens one by one under its own
            mask.
        follows_plan: the first part is the plan, each of the others is a step of the execution or the answer after
            them. Each row has a partial order over the steps, see [`see_steps`]. Its parts are as many as its plan
            has steps, and the answer; each opens with `<|execution|>`.
    """

    parts: tuple[Part, ...]
    mask_token_id: int
    plan_token_id: int
    execution_token_id: int
    end_token_id: int
    pad_token_id: int
    is_aligned: bool = False
    is_joint: bool = False
    is_shifted: bool = False
    has_causal_question: bool = False
    is_autoregressive: bool = False
    follows_plan: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "BlockOrder":
        """The order of a `HierBD3LMConfig`."""
        plan = Part((PLAN,), config.plan_block_size, config.plan_len, config.plan_token_id)
        size, length = config.execution_block_size, config.execution_len
        execution = Part((EXECUTION,), size, length, config.execution_token_id)
        if config.is_flat:
            opener = plan.opener_token_id if config.has_plan else execution.opener_token_id
            parts: tuple[Part, ...] = (Part((PLAN, EXECUTION), size, plan.max_len + length, opener),)
        elif not config.has_plan:
            parts = (execution,)
        elif config.execution_order == "plan":
            step = Part(execution.segments, size, config.step_len, execution.opener_token_id, after=(0,))
            parts = (plan, *[step] * (length // config.step_len))
        else:
            after = (0,) if config.hierarchical_mask else ()
            parts = (plan, Part(execution.segments, size, length, execution.opener_token_id, after))
        return cls(
            parts,
            **{name: getattr(config, name) for name in TOKEN_IDS},
            is_aligned=not config.hierarchical_mask,
            is_joint=config.joint,
            is_shifted=config.prediction == "shifted" and config.algorithm != "ar",
            has_causal_question=config.question_attention == "causal" and config.algorithm != "ar",
            is_autoregressive=config.algorithm == "ar",
            follows_plan=config.execution_order == "plan",
        )

    @property
    def is_causal(self) -> bool:
        """True if every token depends on exactly the tokens before it: likelihood and loss need no noise."""
        if self.is_autoregressive:
            return True
        return self.is_chain and self.predicts_from_clean and self.has_causal_question

    @property
    def is_token_by_token(self) -> bool:
        """True if every token is a block with a noise level of its own."""
        return not self.is_joint and not self.is_aligned and all(part.block_size == 1 for part in self.parts)

    @property
    def predicts_from_clean(self) -> bool:
        """True if every token is predicted at the clean token before it: each is the first of its block."""
        return self.is_shifted and self.is_token_by_token

    @property
    def has_noisy_stream(self) -> bool:
        """True if a training pass holds clean and noisy tokens; else it has one stream."""
        return not (self.is_autoregressive or self.is_joint or self.predicts_from_clean)

    @property
    def segments(self) -> tuple[int, ...]:
        """Segments that an answer has."""
        return (PLAN, EXECUTION) if self.parts[0].opener_token_id == self.plan_token_id else (EXECUTION,)

    @cached_property
    def dependencies(self) -> tuple[frozenset[int], ...]:
        """For each part the numbers of all parts before it, direct or not."""
        closed: list[frozenset[int]] = []
        for part in self.parts:
            closed.append(frozenset(part.after).union(*(closed[other] for other in part.after)))
        return tuple(closed)

    @cached_property
    def is_chain(self) -> bool:
        """True if every part is denoised after the one before it is finished, however long that has become."""
        is_total = all(number - 1 in self.dependencies[number] for number in range(1, len(self.parts)))
        return is_total and not self.is_joint and not self.is_aligned

    @cached_property
    def sees(self) -> torch.BoolTensor:
        """Table of shape `(parts, parts)`: does the part of the row see that of the column, whatever the plan says?"""
        numbers = range(len(self.parts))
        return torch.tensor([[p in self.dependencies[q] for p in numbers] for q in numbers])

    @cached_property
    def precedes(self) -> torch.BoolTensor | None:
        """Table of shape `(ranks, ranks)`: may the block of the row's rank see that of the column's?

        None where the ranks themselves are the order (a block sees all of lower rank).
        """
        pairs = [(p, q) for q in range(len(self.parts)) for p in range(q)]
        if self.is_aligned or all(p in self.dependencies[q] for p, q in pairs):
            return None
        return self.block_table(self.sees)

    def block_table(self, sees: torch.BoolTensor) -> torch.BoolTensor:
        """Return the table over blocks, `(..., ranks, ranks)`, of one over parts, `(..., parts, parts)`.

        Every part has `max_len / block_size` blocks, of which each sees those before it.
        """
        part_of = [number for number, part in enumerate(self.parts) for _ in range(part.max_len // part.block_size)]
        part_of = torch.tensor(part_of, device=sees.device)
        sees = sees | torch.eye(len(self.parts), dtype=torch.bool, device=sees.device)
        table = sees[..., part_of, :][..., part_of]
        table = torch.nn.functional.pad(table, (1, 0, 1, 0), value=True)  # the question is seen by all
        return table.tril(diagonal=-1)

    # An order that a plan gives

    @property
    def most_steps(self) -> int:
        """Greatest number of steps of an execution."""
        return len(self.parts) - 2  # without plan and answer

    def see_steps(self, depends_on: DependsOn) -> torch.BoolTensor:
        """Return which parts each part sees, `(parts, parts)`, in an order that follows the plan.

        A step sees the plan and its ancestors, the answer sees all steps.

        Raises:
            ValueError: if there are too many steps, or one depends on itself, a later one or none that there is.
        """
        check_graph(depends_on)
        if len(depends_on) > self.most_steps:
            raise ValueError(f"`depends_on` must have at most {self.most_steps} steps, but got {len(depends_on)}")
        sees = self.sees.clone()
        for step, earlier in enumerate(depends_on, 1):
            for other in earlier:
                sees[step] |= sees[other + 1]
                sees[step, other + 1] = True
        sees[len(depends_on) + 1, : len(depends_on) + 1] = True
        return sees

    def read_plan(self, plan: str, parser: PlanParser) -> tuple[DependsOn, bool]:
        """Return what each step of a plan depends on, and whether the plan says so.

        Of a plan that cannot be parsed, or has too many steps, every line is a step that depends on all before it.
        """
        try:
            depends_on = parser(plan)
        except ValueError:
            depends_on = None
        if depends_on is not None and len(depends_on) <= self.most_steps:
            return depends_on, True
        return total_order(min(len(lines_of(plan)), self.most_steps)), False

    # Training: what is laid out, masked and predicted

    def layout(
        self, segment_ids: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and position ids of clean sequences. Block edges count from each part's start, never from a column.

        Args:
            segment_ids (`torch.LongTensor` of shape `(batch, length)`):
                0 question, 1 plan, 2 execution, -1 padding (anywhere); the segments of a row stand in this order.
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                clean tokens; of an order that follows the plan, to tell the steps apart by their openers.

        Returns:
            `block_ids`, `position_ids`: two `torch.LongTensor` of shape `(batch, length)`. Positions start at 0 at
            the first real token and skip padding, where they are 0. A part that does not wait for the one before it
            starts at a fixed distance from the question, as its first block is denoised before that one's length is
            known. So does a step from the plan: parallel steps have positions of their own, by which a step knows its
            number.
        """
        is_real = segment_ids != PADDING
        position_ids = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)
        block_ids = self.question_ranks(segment_ids == QUESTION)
        ranks, num_before = self.fixed_ranks, torch.zeros_like(position_ids[:, :1])
        next_rank = torch.ones_like(num_before)
        members = self.members(segment_ids, input_ids)
        for number, inside in enumerate(members):
            place = inside.long().cumsum(dim=1) - 1
            rank = place // self.parts[number].block_size
            first = next_rank if self.is_chain else ranks[number]
            block_ids = torch.where(inside, first + rank, block_ids)
            if not self.is_chain:
                start = self.fixed_starts[number]
                if self.follows_plan and number:
                    start = start - self.parts[0].max_len + members[0].sum(dim=1, keepdim=True)
                position_ids = position_ids + inside * (start - num_before)
            next_rank, num_before = next_rank + rank[:, -1:] + 1, num_before + place[:, -1:] + 1
        return block_ids, position_ids.masked_fill(~is_real, 0)

    def question_ranks(self, is_question: torch.BoolTensor) -> torch.LongTensor:
        """Ranks of the question's tokens, -1 elsewhere; `is_question` and result are of shape `(batch, length)`."""
        ranks = torch.zeros_like(is_question, dtype=torch.long)
        if self.has_causal_question:
            ranks = is_question.cumsum(dim=1) - is_question.sum(dim=1, keepdim=True) - 2
        return ranks.masked_fill(~is_question, PADDING)

    def noise_blocks(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Ids of the blocks that have a noise level of their own, of the shape of `block_ids`."""
        if self.is_joint:
            return block_ids.clamp(max=1)
        if self.is_chain or self.is_aligned:
            return block_ids
        # Ranks leave some out: count the blocks as they stand, so that there are no more than tokens.
        return torch.nn.functional.pad(block_ids.diff(dim=1) != 0, (1, 0)).cumsum(dim=1)

    @property
    def noise_groups(self) -> tuple[tuple[int, ...], ...]:
        """Segments whose tokens share noise levels, together."""
        if self.is_joint or self.is_aligned:
            return (tuple(segment for part in self.parts for segment in part.segments),)
        return tuple(dict.fromkeys(part.segments for part in self.parts))

    def predicted(self, input_ids: torch.LongTensor, segment_ids: torch.LongTensor) -> torch.BoolTensor:
        """Tokens that the model predicts: all of plan and execution but the openers that it is given.

        Args:
            input_ids, segment_ids (`torch.LongTensor` of shape `(batch, length)`): clean tokens and their segments.
        """
        is_opener = torch.zeros_like(input_ids, dtype=torch.bool)
        for opener in {part.opener_token_id for part in self.parts} - {None}:
            is_opener = is_opener | (input_ids == opener)
        return (segment_ids > QUESTION) & ~is_opener

    def multiple(self, segment: int) -> int:
        """A segment is filled with `<|end|>` up to a multiple of so many tokens; 1 where another follows in its part.

        Args:
            segment: `PLAN` or `EXECUTION`.
        """
        return next((part.block_size for part in self.parts if part.segments == (segment,)), 1)

    def fillers(self, lengths: dict[int, int]) -> dict[int, int]:
        """Number of `<|end|>` that each segment is filled with, so that every part is whole blocks.

        Args:
            lengths: tokens of each segment, opener and first `<|end|>` included.
        """
        filled = dict.fromkeys(lengths, 0)
        for part in self.parts:
            filled[part.segments[-1]] = -sum(lengths.get(segment, 0) for segment in part.segments) % part.block_size
        return filled

    # Generation: what is denoised at the same time

    @property
    def predicts_execution_opener(self) -> bool:
        """True if the model itself divides a part into plan and execution."""
        return any(len(part.segments) > 1 for part in self.parts)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """For each part the slot of the canvas in which its blocks are denoised.

        Parts share a slot where one is finished before the other starts.
        """
        slots: list[int] = []
        for number in range(len(self.parts)):
            before = set() if self.is_joint or self.is_aligned else self.dependencies[number]
            taken = {slots[other] for other in range(number) if other not in before}
            slots.append(min(set(range(len(taken) + 1)) - taken))
        return tuple(slots)

    @property
    def fixed_starts(self) -> list[int]:
        """Distance of each part from the end of the question, where parts have their greatest lengths."""
        return [sum(part.max_len for part in self.parts[:number]) for number in range(len(self.parts))]

    @property
    def fixed_ranks(self) -> list[int]:
        """Rank of each part's first block, where parts have their greatest lengths."""
        num_blocks = [0 if self.is_aligned else part.max_len // part.block_size for part in self.parts]
        return [1 + sum(num_blocks[:number]) for number in range(len(self.parts))]

    def members(self, segment_ids: torch.Tensor, input_ids: torch.Tensor | None = None) -> list[torch.BoolTensor]:
        """Return the tokens of each part, `(batch, length)`; arguments as in [`layout`].

        Of several parts of a segment each takes its greatest length, or in an order that follows the plan what comes
        up to the next opener.
        """
        if self.follows_plan:
            return self._steps(segment_ids, input_ids)
        members, taken = [], dict.fromkeys((part.segments for part in self.parts), 0)
        for number, part in enumerate(self.parts):
            inside = torch.isin(segment_ids, segment_ids.new_tensor(part.segments))
            place = inside.long().cumsum(dim=1)
            inside = inside & (place > taken[part.segments])
            taken[part.segments] += part.max_len
            if any(other.segments == part.segments for other in self.parts[number + 1 :]):
                inside = inside & (place <= taken[part.segments])
            members.append(inside)
        return members

    def _steps(self, segment_ids: torch.Tensor, input_ids: torch.Tensor | None) -> list[torch.BoolTensor]:
        """The tokens of the plan and of each step, `(batch, length)`, told apart by the openers of the steps."""
        if input_ids is None:
            raise ValueError("`input_ids` must be given for an order that follows the plan, but got None")
        inside = segment_ids == EXECUTION
        number = (inside & (input_ids == self.execution_token_id)).cumsum(dim=1)
        return [segment_ids == PLAN, *(inside & (number == step) for step in range(1, len(self.parts)))]


def lines_of(plan: str) -> list[str]:
    """Return the lines of a plan that are not empty."""
    return [line.strip() for line in plan.splitlines() if line.strip()]


def total_order(num_steps: int) -> list[list[int]]:
    """Return `depends_on` of steps of which each depends on all before it."""
    return [[*range(step)] for step in range(num_steps)]


def check_graph(depends_on: DependsOn) -> None:
    """Raise a ValueError unless every step depends on earlier steps alone."""
    for step, earlier in enumerate(depends_on):
        if not all(isinstance(other, int) and 0 <= other < step for other in earlier):
            raise ValueError(
                f"`depends_on` must hold numbers of earlier steps, counted from 0, but step {step} has {[*earlier]}"
            )


def parse_plan(plan: str) -> list[list[int]] | None:
    """Read from a plan, one step per line, which earlier steps each step refers to.

    Two forms are read. In numbered steps, `2. Clips altogether: 48 + [1]`, `[1]` is the result of step 1, and `?` may
    be of any earlier step. In named steps, `Mia = Tom + 3`, a name is that of the step which computes it, if any.

    Returns:
        for each step the earlier steps, counted from 0; None for a plan of another form, or with a step that refers to
        itself or a later one.
    """
    lines = lines_of(plan)
    numbered, named = ([form.fullmatch(line) for line in lines] for form in (NUMBERED_STEP, NAMED_STEP))
    if all(numbered) and [int(step[1]) for step in numbered] == [*range(1, len(lines) + 1)]:
        references = [
            {*range(step)} if "?" in match[2] else {int(other) - 1 for other in re.findall(r"\[([0-9]+)\]", match[2])}
            for step, match in enumerate(numbered)
        ]
    elif all(named) and len(number_of := {match[1]: step for step, match in enumerate(named)}) == len(lines):
        references = [
            {number_of[word] for word in re.findall(r"\w+", match[2]) if word in number_of} for match in named
        ]
    else:
        return None
    depends_on = [sorted(earlier) for earlier in references]
    is_acyclic = all(0 <= other < step for step, earlier in enumerate(depends_on) for other in earlier)
    return depends_on if is_acyclic and lines else None
