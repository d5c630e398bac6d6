"""Requests of the server: the fields of OpenAI's API, and the generation settings beside them.

One rule for every field. A field that the server can honour is honoured. A field that only labels a request
(`IGNORED`) is ignored. A field that would change the answer in a way that the server cannot (`NEUTRAL`) is accepted
with the values that change nothing, and refused with any other. All other names are refused.
"""

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..settings_hierbd3lm import GenerationSettings

# those that a request has are None unless given; `plan` chooses the stage, and compilation is a setting of the server
NOT_IN_REQUESTS = ("stage", "compile_steps")
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stop": (None, [], ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}


class Strict(BaseModel):
    """Refuses unknown fields, and converts no value to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = Field(None, description="Plan of an earlier answer; ignored.")
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Send the usage in a last chunk.")
    include_obfuscation: bool = Field(False, description="Ignored.")


Settings = create_model(
    "Settings",
    __base__=Strict,
    **{
        item.name: (item.type | None, Field(None, description=item.metadata["help"]))
        for item in fields(GenerationSettings)
        if item.name not in NOT_IN_REQUESTS
    },
    **{name: (Any, Field(None, description="Ignored.")) for name in IGNORED},
    **{
        name: (Any, Field(None, description=f"Only {' or '.join(map(repr, values))}."))
        for name, values in NEUTRAL.items()
    },
)


class GenerationRequest(Settings):
    """What both kinds of requests have."""

    model: str | None = Field(None, description="Name of the model; the one that is served if omitted.")
    stream: bool | None = Field(None, description="Send the answer block by block, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="Another name for `max_new_tokens`.")
    max_completion_tokens: int | None = Field(None, description="Another name for `max_new_tokens`.")
    plan: str | None = Field(None, description="Plan to execute, in place of the model's.")

    @model_validator(mode="after")
    def check_neutral(self) -> "GenerationRequest":
        """Refuse values that would change the answer in a way that the server cannot."""
        for name, accepted in NEUTRAL.items():
            value = getattr(self, name)
            # 0 == False: types are compared too
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, accepted))} here, but got {value!r:.80}")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the generation settings that are given.

        Raises:
            ValueError: for different limits of the number of tokens.
        """
        given = {
            name: value
            for item in fields(GenerationSettings)
            if item.name not in NOT_IN_REQUESTS and (value := getattr(self, name := item.name)) is not None
        }
        names = ("max_new_tokens", "max_tokens", "max_completion_tokens")
        limits = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(set(limits.values())) > 1:
            raise ValueError(f"`max_tokens` must be one number under all of its names, but got {limits}")
        if limits:
            given["max_new_tokens"] = next(iter(limits.values()))
        return given | ({} if self.plan is None else {"stage": "execution"})


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`: questions that are encoded as they are, without a chat template."""

    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The questions, as texts or token ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else list(self.prompt)
