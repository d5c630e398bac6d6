"""Answers of models without noise: written token by token, with the backbone's own `generate`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .denoising_hierbd3lm import Answer, never_written, right_justify, stream
from .masking_hierbd3lm import PADDING
from .order_hierbd3lm import BlockOrder
from .schedule_hierbd3lm import ends_part
from .settings_hierbd3lm import HierBD3LMGenerationConfig


def write_causally(
    model: Any,
    settings: HierBD3LMGenerationConfig,
    answer: Answer,
    question: torch.LongTensor,
    attention_mask: torch.Tensor,
    streamer: BaseStreamer | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> None:
    """Write the answer token by token, with the backbone's own `generate` and cache."""
    schedule, order = answer.schedule, answer.order
    context, block_ids, _, _ = schedule.context
    keep = torch.cat([attention_mask.bool(), block_ids != PADDING], dim=1)
    prompt, prompt_mask = right_justify(torch.cat([question, context], dim=1), keep)
    num_given = schedule.context_lengths[:, 0]
    num_left = int(schedule.limits[0]) - num_given
    if settings.max_new_tokens is not None:
        num_left = num_left.clamp(max=settings.max_new_tokens)
    awaits_end = schedule.progress.awaits_end[:, 0]
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": float(settings.temperature)}
        sampling |= {"top_p": float(settings.top_p), "top_k": 0}
    stopped = FirstStop(criteria, prompt)
    with seeded(settings.seed if settings.temperature > 0 else None, question.device):
        sequences = model.backbone.generate(
            prompt,
            attention_mask=prompt_mask,
            max_new_tokens=int(num_left.amax()),
            logits_processor=processors,
            stopping_criteria=[LastEnd(awaits_end, order), StoppedRows(answer, streamer), stopped],
            streamer=None if streamer is None else StreamerAfterPrompt(streamer, order),
            # what a checkpoint's own settings may say otherwise
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=order.pad_token_id,
            suppress_tokens=never_written(order, settings).tolist(),
            use_cache=True,
            **sampling,
        )
    tokens = sequences[:, prompt.shape[1] :]
    inside = torch.ones_like(tokens, dtype=torch.bool)
    is_last_end = ends_part(tokens, inside, awaits_end[:, None], order.execution_token_id)
    ended = (is_last_end & (tokens == order.end_token_id)).cumsum(dim=1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    within = (ended.cumsum(dim=1) <= 1) & (columns < torch.minimum(num_left, stopped.lengths)[:, None])
    positions = (answer.question_lengths + num_given)[:, None] + columns
    index = torch.arange(len(tokens), device=tokens.device)
    answer.write(index, within, tokens, positions, torch.zeros_like(tokens))
    answer.finished = ((ended > 0) & within).any(dim=1)
    answer.num_forward_passes += within.sum(dim=1)
    if hasattr(streamer, "put_rows"):
        streamer.put_rows(answer, [])


class LastEnd(StoppingCriteria):
    """Stops a row at the `<|end|>` that ends its run of plan and execution.

    Args:
        awaits_end (`torch.BoolTensor` of shape `(batch,)`): rows that the next `<|end|>` ends.
    """

    def __init__(self, awaits_end: torch.BoolTensor, order: BlockOrder):
        self.awaits_end, self.ended = awaits_end.clone(), torch.zeros_like(awaits_end)
        self.order = order

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        last = input_ids[:, -1]
        self.ended = self.ended | (self.awaits_end & (last == self.order.end_token_id))
        self.awaits_end = self.awaits_end | (last == self.order.execution_token_id)
        return self.ended


class StoppedRows(StoppingCriteria):
    """Stops the rows that a streamer with `put_rows` returns."""

    def __init__(self, answer: Answer, streamer: BaseStreamer | None):
        self.answer, self.streamer = answer, streamer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if hasattr(self.streamer, "put_rows"):
            stopped[list(self.streamer.put_rows(self.answer, list(range(len(input_ids)))))] = True
        return stopped


class FirstStop(StoppingCriteria):
    """Stops the rows that some criteria stop, and keeps how many tokens each had by then: `lengths`, `(batch,)`."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: torch.LongTensor):
        self.criteria, self.prompt_length = criteria, prompt.shape[1]
        self.lengths = torch.full((len(prompt),), torch.iinfo(torch.long).max, device=prompt.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        length = input_ids.shape[1] - self.prompt_length
        if self.criteria:
            self.lengths[self.criteria(input_ids, None) & (self.lengths > length)] = length
        return self.lengths <= length


class StreamerAfterPrompt(BaseStreamer):
    """Forwards generated tokens, and the opener before them, to a streamer that has received the question."""

    def __init__(self, streamer: BaseStreamer, order: BlockOrder):
        self.streamer, self.order, self.is_prompt = streamer, order, True

    def put(self, value: torch.LongTensor) -> None:
        stream(self.streamer, value.flatten()[-1:] if self.is_prompt else value, self.order)
        self.is_prompt = False

    def end(self) -> None:
        pass


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators within the context, and restore their state afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
