"""The settings of generation, each declared once with its default, its accepted values and its help text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

STAGES = ("full", "plan", "execution")
SAMPLERS = ("first_hitting", "ancestral", "confidence", "entropy")
# settings that only some samplers read
SAMPLERS_OF = {
    "num_steps": ("ancestral",),
    "threshold": ("confidence",),
    "entropy_bound": ("entropy",),
    "tokens_per_step": ("confidence", "entropy"),
    "left_to_right": ("confidence", "entropy"),
}
# arguments of transformers' `generate` that do not apply here -> what to use instead
NOT_APPLICABLE = {
    "max_length": "`max_new_tokens` limits the answer, `max_plan_len` and `max_execution_len` its segments",
    **dict.fromkeys(("min_new_tokens", "min_length"), "a segment ends where the model predicts <|end|>"),
    "do_sample": "`temperature` > 0 samples, 0 is greedy",
    "top_k": "`top_p` limits the distribution",
    **dict.fromkeys(("num_beams", "num_beam_groups", "penalty_alpha"), "`sampler` chooses how tokens are revealed"),
    "use_cache": "the block cache is always used",
    "bos_token_id": "special tokens are those of the configuration",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_attentions", "output_hidden_states"),
        "the output is a HierBD3LMGenerationOutput",
    ),
    **dict.fromkeys(
        ("output_scores", "output_logits"),
        "a token is denoised in one of several passes over its block; a `logits_processor` sees the logits of each",
    ),
    **dict.fromkeys(
        ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
        "pass the processor of transformers as `logits_processor`",
    ),
    "stop_strings": "it may end inside a block: cut the text, or pass `stopping_criteria`, which see whole blocks",
}
ATTENTIONS = ("sdpa", "eager", "flex_attention")  # that take the mask
MAX_INTEGER = 2**63 - 1

logger = logging.get_logger(__name__)


@dataclass(eq=False, repr=False)
class GenerationSettings:
    """Settings of [`~generation_hierbd3lm.HierBD3LMGenerationMixin.generate`].

    Raises:
        ValueError: for a value out of its range; the message names the setting, the value and the range.
    """

    stage: str = field(
        default="full",
        metadata={
            "help": "`full` denoises plan and execution in the order that the model is trained for, `plan` the plan "
            "only, `execution` the execution of given `plan_ids`. For a model without a plan `full` and `execution` "
            "are the same."
        },
    )
    sampler: str = field(
        default="confidence",
        metadata={
            "help": "`first_hitting`: one token per step, at random times; exact. `ancestral`: `num_steps` time "
            "steps per block. `confidence`: every token whose probability exceeds `threshold`. `entropy`: the tokens "
            "of lowest entropy within `entropy_bound`."
        },
    )
    num_steps: int = field(default=16, metadata={"help": "Time steps per block of the `ancestral` sampler; >= 1."})
    threshold: float = field(
        default=0.9, metadata={"help": "Confidence threshold of the `confidence` sampler, in (0, 1]."}
    )
    entropy_bound: float = field(
        default=0.1, metadata={"help": "Entropy bound of the `entropy` sampler, in nats; >= 0."}
    )
    tokens_per_step: int = field(
        default=1, metadata={"help": "Minimum number of tokens that `confidence` and `entropy` reveal per step; >= 1."}
    )
    left_to_right: bool = field(
        default=False,
        metadata={
            "help": "`confidence` and `entropy` accept tokens from the left of the block up to the first one that "
            "fails the test, instead of the most confident tokens first."
        },
    )
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "Temperature of the token distribution; 0 is greedy. Acceptance always uses plain probabilities."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the token distribution, in (0, 1]."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Block size, in place of the model's; >= 1. Divides the maximum lengths."},
    )
    fill_after_end: bool = field(
        default=True,
        metadata={"help": "Fills what follows an <|end|> in its block with <|end|> without a forward pass."},
    )
    max_plan_len: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of plan tokens, opener and <|end|> included; whole blocks. The model's `plan_len` "
            "if omitted."
        },
    )
    max_execution_len: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of execution tokens, opener and <|end|> included; whole blocks. The model's "
            "`execution_len` if omitted."
        },
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of plan and execution together; >= 1. Answers stop at the last block "
            "edge within it."
        },
    )
    compile_steps: bool = field(
        default=False,
        metadata={
            "help": "Runs forward passes through `torch.compile`: the first answers take up to a minute longer, all "
            "later passes less time."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Random seed of the draws; drawn from torch's global generator if omitted."}
    )

    def __post_init__(self) -> None:
        self.validate()

    def validate(self, **unused_kwargs: Any) -> None:
        """Check every setting.

        Raises:
            ValueError: for a value out of its range.
        """
        for name, choices in (("stage", STAGES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {getattr(self, name)!r}")
        for name in ("num_steps", "tokens_per_step"):
            self._check_number(name, int, "an integer >= 1", lambda value: value >= 1)
        if self.block_size is not None:
            self._check_number("block_size", int, "an integer >= 1 or None", lambda value: value >= 1)
        if self.max_new_tokens is not None:
            self._check_number("max_new_tokens", int, "an integer >= 1 or None", lambda value: value >= 1)
        for name in ("max_plan_len", "max_execution_len"):
            if getattr(self, name) is not None:
                self._check_number(name, int, "an integer >= 0 or None", lambda value: value >= 0)
        if self.seed is not None:
            accepted = "an integer >= 0 or None, below 2**63"
            self._check_number("seed", int, accepted, lambda value: 0 <= value <= MAX_INTEGER)
        for name in ("threshold", "top_p"):
            self._check_number(name, int | float, "a number in (0, 1]", lambda value: 0 < value <= 1)
        self._check_number("entropy_bound", int | float, "a number >= 0", lambda value: value >= 0)
        self._check_number("temperature", int | float, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        for name in ("left_to_right", "fill_after_end", "compile_steps"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but got {getattr(self, name)!r}")

    def _check_number(self, name: str, kind: type, accepted: str, in_range: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not in_range(value):
            raise ValueError(f"`{name}` must be {accepted}, but got {value!r}")
        if isinstance(value, int) and value > MAX_INTEGER:
            raise ValueError(f"`{name}` must be below 2**63, but got an integer of {value.bit_length()} bits")


SETTINGS = tuple(item.name for item in fields(GenerationSettings))


class HierBD3LMGenerationConfig(GenerationSettings, GenerationConfig):
    """[`GenerationSettings`] as transformers' `GenerationConfig`: saved and loaded with a checkpoint.

    Raises:
        ValueError: for an unknown setting or a value out of its range, also when it is set as an attribute.
    """

    # The Trainer writes the tokenizer's special tokens here; those of generation are the model configuration's.
    bos_token_id = eos_token_id = pad_token_id = property(lambda self: None, lambda self, token_id: None)

    def __init__(self, **kwargs: Any):
        # `GenerationConfig.__init__` is left out on purpose, as in DiffusionGemma: none of its settings apply.
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool | None = kwargs.pop("_from_model_config", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        check_names(kwargs)
        GenerationSettings.__init__(self, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name) and name != "transformers_version":
            check_names([name])
        if name in SETTINGS:
            GenerationSettings(**(settings_of(self) | {name: value}))  # raises
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "HierBD3LMGenerationConfig":
        """Build the settings of a file. Names that are no settings are ignored with a warning: it can be loaded."""
        known = {*SETTINGS, "transformers_version"}
        config_dict = {name: value for name, value in config_dict.items() if name != "do_sample"}  # by temperature
        if unknown := [name for name in config_dict if name not in known and not name.startswith("_")]:
            logger.warning(f"These names are no settings of {cls.__name__} and are ignored: {', '.join(unknown)}")
        return super().from_dict({n: value for n, value in config_dict.items() if n not in unknown}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults, and those for which a pipeline would put its own defaults."""
        sampling = {"do_sample": self.temperature > 0, "max_new_tokens": self.max_new_tokens}
        return super().to_diff_dict() | sampling

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("block diffusion has samplers instead of autoregressive generation modes")

    def from_model_config(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a HierBD3LMConfig holds no generation settings")


def check_names(names: Iterable[str]) -> None:
    """Raise a ValueError for a name that is no setting; it says what to use instead."""
    for name in names:
        if name in NOT_APPLICABLE:
            raise ValueError(f"`{name}` does not apply to block diffusion: {NOT_APPLICABLE[name]}")
        if name not in SETTINGS:
            nearest = did_you_mean(name, SETTINGS)
            raise ValueError(f"`generation_config` has no setting {name}; it has {', '.join(SETTINGS)}{nearest}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error's text: the known name that is nearest to an unknown one, if any is near."""
    return "".join(f"; did you mean `{match}`?" for match in get_close_matches(name, known, n=1))


def resolve_settings(base: GenerationConfig, overrides: dict[str, Any]) -> HierBD3LMGenerationConfig:
    """Return the settings of `base` with `overrides` in their place, checked.

    Raises:
        ValueError: if `base` is not a [`HierBD3LMGenerationConfig`], for a setting that is unknown or out of range,
            and for an override that the sampler does not read.
    """
    if any(not hasattr(base, name) for name in SETTINGS):
        raise ValueError(
            f"`generation_config` must be a HierBD3LMGenerationConfig, but {type(base).__name__} was given"
        )
    settings = HierBD3LMGenerationConfig(**(settings_of(base) | overrides))
    for name in overrides.keys() & SAMPLERS_OF:
        if settings.sampler not in SAMPLERS_OF[name] and overrides[name] != getattr(base, name):
            raise ValueError(
                f"`{name}` has no effect with sampler={settings.sampler!r}: it is a setting of "
                f"{' and '.join(SAMPLERS_OF[name])}, but got {overrides[name]!r}"
            )
    return settings


def read_foreign_names(config: Any, base: GenerationConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return overrides with transformers' `do_sample`, `pad_token_id` and `eos_token_id` in terms of our settings.

    Raises:
        ValueError: for a `do_sample` that contradicts `temperature`, and other ids than the configuration's.
    """
    overrides = dict(overrides)
    for name, own in (("pad_token_id", config.pad_token_id), ("eos_token_id", config.end_token_id)):
        if (token_id := overrides.pop(name, None)) not in (None, own):
            raise ValueError(f"`{name}` must be the configuration's {own} or None, but got {token_id}")
    do_sample = overrides.pop("do_sample", None)
    if do_sample is False:
        if overrides.setdefault("temperature", 0.0) > 0:
            raise ValueError(f"`temperature` must be 0 with do_sample=False, but got {overrides['temperature']}")
    elif do_sample and not overrides.get("temperature", getattr(base, "temperature", 0.0)):
        overrides["temperature"] = 1.0  # the default of transformers
    return overrides


def settings_of(settings: HierBD3LMGenerationConfig) -> dict[str, Any]:
    """Return the generation settings alone, as JSON takes them."""
    return {name: getattr(settings, name) for name in SETTINGS}
