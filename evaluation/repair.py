"""Changes of one step of an answer: a step of the plan is replaced, or an execution step is denoised again.

Everything before the step stays, token for token: it is encoded with the question in one forward pass, not denoised.
All execution steps after it follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..data.decoding import decode
from ..data.questions import encode_text
from ..data.steps import first_wrong_step, step_spans
from ..denoising_hierbd3lm import HierBD3LMGenerationOutput
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion


def replan(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    output: HierBD3LMGenerationOutput,
    step: int | Sequence[int],
    new_step: str | Sequence[str | None] | None = None,
    **settings: Any,
) -> HierBD3LMGenerationOutput:
    """Replace a step of each plan, and denoise the execution from that step on.

    Args:
        inputs: `input_ids` and `attention_mask` that `output` was generated from.
        output: plans and executions. The k-th line of an execution carries out the k-th line of its plan.
        step: index of the step, counted from 0; one for all rows or one for each.
        new_step: text of the new step, without its line break; None keeps the plan.
        settings: generation settings; those of the checkpoint if omitted.

    Returns:
        the output of `generate`; its `num_forward_passes` are those of the changed steps alone.

    Raises:
        ValueError: for a step that a plan does not have, a new step of several lines, or another number of steps than
            rows.
    """
    pad, num_rows = model.config.pad_token_id, len(output.plan)
    steps = [step] * num_rows if isinstance(step, int) else list(step)
    new_steps = [new_step] * num_rows if new_step is None or isinstance(new_step, str) else list(new_step)
    for name, values in (("step", steps), ("new_step", new_steps)):
        if len(values) != num_rows:
            raise ValueError(f"`{name}` must be one value or one for each of {num_rows} rows, but got {len(values)}")
    plans, executions = ([_content(row, pad) for row in rows] for rows in (output.plan, output.execution))
    pairs = zip(plans, steps, new_steps, strict=True)
    changed = [replace_step(ids, index, text, tokenizer) for ids, index, text in pairs]
    most = (settings.get("max_execution_len") or model.config.execution_len) - 2  # an execution may have been cut
    kept = [ids_before_step(ids, index, tokenizer)[:most] for ids, index in zip(executions, steps, strict=True)]
    given = {"plan_ids": _pad(changed, pad, model.device)}
    if any(kept):
        given["execution_ids"] = _pad(kept, pad, model.device)
    mask = inputs.get("attention_mask")
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    return model.generate(**prompt, **given, **(settings | {"stage": "execution"}))


def replace_step(ids: list[int], step: int, new_step: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a plan with another step; those outside of the step stay.

    Raises:
        ValueError: for a step that the plan does not have, or a new step that is not one line.
    """
    text = decode(ids, tokenizer)
    spans = step_spans(text)
    if not 0 <= step < len(spans):
        raise ValueError(f"`step` must be in [0, {len(spans) - 1}] for a plan of {len(spans)} steps, but got {step}")
    if new_step is None:
        return ids
    if len(step_spans(new_step)) != 1:
        raise ValueError(f"`new_step` must be one line, but got {new_step!r}")
    start, end = spans[step]
    first = _tokens_within(ids, text[:start], tokenizer)
    last = next(number for number in range(first, len(ids) + 1) if len(decode(ids[:number], tokenizer)) >= end)
    around = text[len(decode(ids[:first], tokenizer)) : start], text[end : len(decode(ids[:last], tokenizer))]
    middle = encode_text(around[0] + new_step.strip() + around[1], tokenizer, add_special_tokens=False)
    return [*ids[:first], *middle, *ids[last:]]


def ids_before_step(ids: list[int], step: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of an execution before one of its steps; if it has fewer, those of all steps."""
    text = decode(ids, tokenizer)
    spans = step_spans(text)
    end = spans[step][0] if step < len(spans) else max((end for _, end in spans), default=0)
    return ids[: _tokens_within(ids, text[:end], tokenizer)]


@dataclass
class Repaired:
    """Answers after the steps with wrong arithmetic were denoised again, once.

    Args:
        executions: content tokens of each execution.
        steps: index of the step that was denoised again; None for an answer without such a step.
        is_better: whether the arithmetic of the new execution is right, so that it replaces the old one.
        num_forward_passes: additional passes of each row.
    """

    executions: list[list[int]]
    steps: list[int | None]
    is_better: list[bool]
    num_forward_passes: list[int]


def repair(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    output: HierBD3LMGenerationOutput,
    temperature: float = 0.7,
    **settings: Any,
) -> Repaired:
    """Denoise executions again from the first step whose arithmetic is wrong; see [`~data.steps.first_wrong_step`].

    A new execution with a wrong step is dropped. Only the executions are read, no reference answer.

    Args:
        inputs, output, settings: see [`replan`].
        temperature: temperature of the new steps.
    """
    pad = model.config.pad_token_id
    executions = [_content(row, pad) for row in output.execution]
    num_steps = [len(step_spans(decode(_content(row, pad), tokenizer))) for row in output.plan]
    steps = [first_wrong_step(decode(ids, tokenizer)) for ids in executions]
    steps = [step if step is not None and step < most else None for step, most in zip(steps, num_steps, strict=True)]
    result = Repaired(executions, steps, [False] * len(steps), [0] * len(steps))
    rows = [row for row, step in enumerate(steps) if step is not None]
    if not rows:
        return result
    part = HierBD3LMGenerationOutput(plan=output.plan[rows], execution=output.execution[rows])
    of_rows = {name: ids[rows] for name, ids in inputs.items()}
    wrong = [steps[row] for row in rows]
    new = replan(model, tokenizer, of_rows, part, wrong, temperature=temperature, **settings)
    for place, row in enumerate(rows):
        ids = _content(new.execution[place], pad)
        result.num_forward_passes[row] = int(new.num_forward_passes[place])
        result.is_better[row] = bool(new.finished[place]) and first_wrong_step(decode(ids, tokenizer)) is None
        if result.is_better[row]:
            result.executions[row] = ids
    return result


def _tokens_within(ids: list[int], start: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many of the first tokens `start` has in whole."""
    return max(number for number in range(len(ids) + 1) if start.startswith(decode(ids[:number], tokenizer)))


def _content(row: torch.Tensor, pad_token_id: int) -> list[int]:
    return [token for token in row.tolist() if token != pad_token_id]


def _pad(rows: list[list[int]], pad_token_id: int, device: torch.device) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=pad_token_id).to(device)
