"""Replies of the server: whole answers and the chunks of a stream, in the form of OpenAI's API."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from .engine import Delta

Answer = dict[str, Any]  # of `read_answer`


def count_usage(answers: Sequence[Answer], plan_is_given: bool) -> dict[str, Any]:
    """Return the usage: OpenAI's counts, and the forward passes (NFE) beside them. A given plan is in the prompt."""

    def total(name: str) -> int:
        return sum(answer[name] for answer in answers)

    plan, execution = total("num_plan_tokens"), total("num_execution_tokens")
    reasoning = 0 if plan_is_given else plan
    prompt, completion = total("num_question_tokens") + plan - reasoning, reasoning + execution
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "num_forward_passes": total("num_forward_passes"),
    }


class Reply:
    """The reply to one request; one choice per answer.

    Args:
        model: name of the model.
        plan_is_given: whether the request has the plan.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, plan_is_given: bool):
        self.plan_is_given = plan_is_given
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a reply that is not streamed."""
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return self.head | {"object": self.kind, "choices": choices, "usage": count_usage(answers, self.plan_is_given)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk with the usage."""
        return self.head | {
            "object": self.chunk_kind,
            "choices": [],
            "usage": count_usage(answers, self.plan_is_given),
        }

    def first(self, number: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice, if there is one."""
        raise NotImplementedError

    def delta(self, number: int, delta: Delta) -> dict[str, Any]:
        """Return the chunk with a piece of text."""
        raise NotImplementedError

    def last(self, number: int, answer: Answer) -> dict[str, Any]:
        """Return the chunk that closes a choice."""
        raise NotImplementedError

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, number: int, **fields: Any) -> dict[str, Any]:
        choice = {"index": number, "logprobs": None, "finish_reason": None} | fields
        return self.head | {"object": self.chunk_kind, "choices": [choice]}


class ChatReply(Reply):
    """Plan as `reasoning_content`, execution as `content`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, number: int) -> dict[str, Any]:
        return self._chunk(number, delta={"role": "assistant", "content": ""})

    def delta(self, number: int, delta: Delta) -> dict[str, Any]:
        name = {"plan": "reasoning_content", "execution": "content"}[delta.segment]
        return self._chunk(number, delta={name: delta.text})

    def last(self, number: int, answer: Answer) -> dict[str, Any]:
        return self._chunk(number, delta={}, finish_reason=finish_reason(answer))

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer["execution"], "reasoning_content": answer["plan"]}
        message["refusal"] = None
        return {"index": number, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}


class CompletionReply(Reply):
    """Execution as `text`, with the plan beside it as `reasoning_content`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def first(self, number: int) -> None:
        return None

    def delta(self, number: int, delta: Delta) -> dict[str, Any]:
        texts = {"text": "", "reasoning_content": ""}
        texts[{"plan": "reasoning_content", "execution": "text"}[delta.segment]] = delta.text
        return self._chunk(number, **texts)

    def last(self, number: int, answer: Answer) -> dict[str, Any]:
        return self._chunk(number, text="", reasoning_content="", finish_reason=finish_reason(answer))

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        texts = {"text": answer["execution"], "reasoning_content": answer["plan"]}
        return {"index": number, "logprobs": None, "finish_reason": finish_reason(answer)} | texts


def finish_reason(answer: Answer) -> str:
    """Return `stop` if every segment was closed, `length` if one reached its limit."""
    return "stop" if answer["finished"] else "length"
