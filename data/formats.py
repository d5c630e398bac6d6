"""Conversion of rows in other formats to question, plan and execution."""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Parser = Callable[[dict[str, Any]], dict[str, Any]]

PLAN_KEYS = ("reasoning_content", "thinking")  # of a message: where chat models keep what precedes the answer


def find_parser(target: str) -> Parser:
    """Import a function that is named as `module:function`; the working directory is searched too.

    Raises:
        ValueError: if the text has another form, or if there is no such module or function.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"`parse_example` must have the form 'module:function', but got {target!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        parser = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"`parse_example` must name a module, but got {target!r}: {error}") from error
    if not callable(parser):
        raise ValueError(f"`parse_example` must name a function of the module {module}, but got {target!r}")
    return parser


def parser_for(columns: Sequence[str]) -> Parser | None:
    """Return the conversion of a format for supervised fine-tuning, recognised by its columns; None for others."""
    if {"question", "execution"} <= {*columns}:
        return None
    if "messages" in columns:
        return parse_messages
    return parse_prompt_completion if {"prompt", "completion"} <= {*columns} else None


def parse_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a conversation: an optional system message, one user message, one assistant message.

    The question is the system message, a blank line and the user message. The plan is the column `plan`, or the
    assistant's `reasoning_content` or `thinking`, or empty. The execution is what the assistant says.

    Raises:
        ValueError: for a conversation of other roles, and for a content that is not text.
    """
    return _convert(row, _read_messages(row["messages"], role="user"))


def parse_prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a prompt and its completion, both of them texts or lists of messages.

    The question is the prompt, the plan the column `plan` or empty, the execution the completion. For messages see
    [`parse_messages`].

    Raises:
        ValueError: if one of them is neither a text nor a list of messages.
    """
    return _convert(row, _read_messages(row["prompt"], "user") + _read_messages(row["completion"], "assistant"))


def _read_messages(value: Any, role: str) -> list[Mapping[str, Any]]:
    """Return a list of messages, given as such, as JSON, or as the text of one message."""
    if isinstance(value, str) and value.startswith("[{"):
        with contextlib.suppress(json.JSONDecodeError):  # a text may begin like JSON
            value = json.loads(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"messages must be a text or a list with roles and contents, but got {value!r}")
    return value


def _convert(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"`messages` must be of user and assistant, or of system, user and assistant, but got {roles}: "
            f"conversations of several turns are not supported"
        )
    *asked, answer = messages
    plan = row.get("plan")
    if plan is None:
        plan = next((answer[key] for key in PLAN_KEYS if answer.get(key)), "")
    converted = {"question": "\n\n".join(map(_content, asked)), "plan": plan, "execution": _content(answer)}
    return converted | ({"answer": row["answer"]} if "answer" in row else {})


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"`content` of a message must be a text, but got {content!r}")
    return content
