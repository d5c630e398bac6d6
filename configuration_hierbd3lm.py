"""Configuration of a hierarchical block diffusion model: backbone, segments, blocks, noise and special tokens."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from difflib import get_close_matches
from inspect import signature
from typing import Any

from transformers.utils import logging
from transformers.utils.versions import require_version

require_version("transformers>=5.21", "The code of hierbd3lm needs it: run `pip install -U transformers`.")

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import RopeParameters  # noqa: E402

from .settings_hierbd3lm import did_you_mean  # noqa: E402

# role -> text of the token; the id of role `r` is `config.<r>_token_id`
SPECIAL_TOKENS = {
    "mask": "<|mask|>",
    "plan": "<|plan|>",
    "execution": "<|execution|>",
    "end": "<|end|>",
}

NOISE_SCHEDULES = ("loglinear", "square", "cosine", "log")
ALGORITHMS = ("hier", "bd3lm", "mdlm", "sedd", "ar")
PREDICTIONS = ("in_place", "shifted")
EXECUTION_ORDERS = ("chain", "plan")
QUESTION_ATTENTIONS = ("bidirectional", "causal")
SIZED_BY_ALGORITHM = ("mdlm", "sedd", "ar")  # with only one possible block size
DEFAULT_BACKBONE = "qwen3"
BLOCK_SIZES = {"plan_block_size": "plan_len", "execution_block_size": "execution_len"}  # -> what a block is part of


logger = logging.get_logger(__name__)


def _field(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


class HierBD3LMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`HierBD3LMForBlockDiffusion`]. `config_fields()` lists its fields with their help texts.

    A sequence is `[question | plan | execution]`. The plan opens with `<|plan|>`, the execution with `<|execution|>`;
    both are closed by `<|end|>`, which also fills the rest of the segment's last block. Openers and `<|end|>` count
    towards `plan_len` and `execution_len`.

    All algorithms except `hier` know no segments: what follows the question is one run of tokens, `<|plan|>` is
    given, `<|execution|>` is predicted like any token, and only the end of the run is filled.

    `joint` and `hierarchical_mask` give four ablations of the hierarchy:

    | | with the mask | without |
    |---|---|---|
    | block by block | plan blocks, then execution blocks (the default) | the i-th blocks of both at the same time |
    | joint | both at once, the plan never sees the execution | both at once, as one block |

    Raises:
        ValueError: for a value out of its range; the message names the field, the value and the range. Also for an
            unknown argument that looks like a misspelt field, which transformers would store silently.
    """

    model_type = "hierbd3lm"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (a class attribute that transformers reads)

    backbone_config: dict | PreTrainedConfig | None = _field(
        None,
        "Configuration of the decoder: any architecture of AutoModelForCausalLM, as a configuration or as a dict with "
        "its `model_type` (default `qwen3`) and its fields.",
    )
    algorithm: str = _field(
        "hier",
        "`hier`: blocks of the plan, then blocks of the execution, each segment on its own grid. `bd3lm`: one run of "
        "blocks after the question (Arriola et al. 2025). `mdlm`: the same with one block of plan_len + execution_len "
        "tokens (Sahoo et al. 2024). `sedd`: as `mdlm`, trained on the score entropy of the absorbing graph (Lou et "
        "al. 2024). `ar`: the backbone as a causal language model.",
    )
    hierarchical_mask: bool = _field(
        True,
        "False, for `hier` only: the i-th blocks of plan and execution are one block, which sees itself and the clean "
        "blocks before it. The execution then starts plan_len positions after the plan's start.",
    )
    joint: bool = _field(
        False,
        "True, for `hier` only: plan and execution are one block each and share their noise level. With the "
        "hierarchical mask the execution attends to the noisy plan, and the plan to itself.",
    )
    execution_order: str = _field(
        "chain",
        "`chain`: blocks of the execution one after the other. `plan`, for `hier` only: every step of the execution "
        "sees question, plan and the steps that it needs by the plan; steps whose ancestors are finished are denoised "
        "at the same time, and an answer after all of them.",
    )
    step_len: int | None = _field(
        None,
        "Maximum number of tokens of a step, opener and `<|end|>` included, for execution_order `plan`: a multiple of "
        "execution_block_size that divides execution_len. The k-th step starts (k - 1) * step_len after the plan.",
    )
    question_len: int = _field(256, "Maximum number of question tokens; 0 for plain text.")
    plan_len: int = _field(
        256, "Maximum number of plan tokens. With 0 there is no plan: `<|execution|>` follows the question."
    )
    execution_len: int = _field(512, "Maximum number of execution tokens.")
    plan_block_size: int | None = _field(
        None,
        "Plan tokens that are denoised together; divides plan_len. 16 if omitted. mdlm, sedd, ar and joint models "
        "have block sizes of their own; those of bd3lm are equal and divide plan_len + execution_len.",
    )
    execution_block_size: int | None = _field(
        None, "Execution tokens that are denoised together; see plan_block_size. Divides execution_len."
    )
    prediction: str | None = _field(
        None,
        "`in_place`: a token is predicted by the hidden state in its place. `shifted`: by that of the token before "
        "it, as in an autoregressive model. By default `shifted` for `ar` and converted checkpoints, else `in_place`.",
    )
    question_attention: str | None = _field(
        None,
        "`bidirectional`: the question's tokens see each other. `causal`: each sees those before it. By default "
        "`causal` for `ar` and converted checkpoints, else `bidirectional`.",
    )
    chat_template: bool = _field(
        False,
        "Encode questions through the chat template of the tokenizer, as a user turn with the generation prompt. By "
        "default True for converted checkpoints whose tokenizer has a template.",
    )
    noise: str = _field("loglinear", f"Noise schedule: {', '.join(NOISE_SCHEDULES)}.")
    sampling_eps: float = _field(
        1e-3, "Smallest mask probability that the Bernoulli estimator of the NELBO draws, in (0, 1)."
    )
    plan_clip: list[float] | tuple[float, float] = _field(
        (0.0, 1.0),
        "Interval of mask rates that training draws from in plan blocks (BD3-LM, section 5.2). A reported likelihood "
        "is never clipped.",
    )
    execution_clip: list[float] | tuple[float, float] = _field(
        (0.0, 1.0), "The same for execution blocks; equal to plan_clip if blocks hold tokens of both segments."
    )
    mask_token_id: int = _field(151669, "Id of the mask token. By default the first free ids of the Qwen3 tokenizer.")
    plan_token_id: int = _field(151670, "Id of the token that opens the plan.")
    execution_token_id: int = _field(151671, "Id of the token that opens the execution.")
    end_token_id: int = _field(151672, "Id of the token that closes a segment.")
    pad_token_id: int = _field(151643, "Id of the padding token; may equal end_token_id.")
    tie_word_embeddings: bool | None = _field(
        None, "Share the embedding matrix with the output head; as in backbone_config if omitted."
    )

    def __post_init__(self, **kwargs):
        refuse_misspelt_fields(kwargs)
        self._check_order()
        for name, choices in (("prediction", PREDICTIONS), ("question_attention", QUESTION_ATTENTIONS)):
            setattr(self, name, self._resolve_choice(name, choices))
        block_size = kwargs.pop("block_size", None)
        for name in BLOCK_SIZES:
            setattr(self, name, self._resolve_block_size(name, block_size))
        self.backbone_config = _resolve_backbone_config(self.backbone_config)
        if not hasattr(self.backbone_config, "vocab_size"):
            raise ValueError(
                f"`backbone_config` must be of a language model, but {self.backbone_config.model_type} has no "
                "vocabulary of its own: of a multimodal model, take the configuration of its text part"
            )
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = getattr(self.backbone_config, "tie_word_embeddings", False)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"`tie_word_embeddings` must be True or False, but got {self.tie_word_embeddings!r}")
        self.backbone_config.tie_word_embeddings = self.tie_word_embeddings
        self._check_fields()
        self.plan_clip, self.execution_clip = list(self.plan_clip), list(self.execution_clip)  # as in JSON
        # Set by hand, as `register_for_auto_class` keeps one auto class only.
        model_class = "modeling_hierbd3lm.HierBD3LMForBlockDiffusion"
        auto_map = {"AutoConfig": "configuration_hierbd3lm.HierBD3LMConfig"}
        kwargs.setdefault("auto_map", auto_map | {"AutoModel": model_class, "AutoModelForCausalLM": model_class})
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "HierBD3LMConfig":
        """Build a configuration from a dict; fields among `kwargs` replace those of the dict and are checked alike.

        Names that the constructor would refuse are left out of the dict, with a warning: a saved configuration can
        always be loaded.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a checkpoint of this model, but its model_type is "
                f"{config_dict['model_type']!r}: convert it with `from_autoregressive`, or train from it, `init_from`"
            )
        refuse_misspelt_fields(kwargs)
        if isinstance(changes := kwargs.get("backbone_config"), dict):
            stored = config_dict.get("backbone_config") or {}
            _refuse_unknown_backbone_fields({"model_type": stored.get("model_type", DEFAULT_BACKBONE)} | changes)
        if misspelt := _misspelt_fields(config_dict):
            logger.warning(f"These names are no fields of {cls.__name__} and are ignored: {', '.join(misspelt)}")
            config_dict = {name: value for name, value in config_dict.items() if name not in misspelt}
        if isinstance(config_dict.get("backbone_config"), dict):  # may hold what other tools have stored
            config_dict = config_dict | {"backbone_config": _make_backbone_config(config_dict["backbone_config"])}
        replaced = {name: kwargs.pop(name) for name in config_fields() if name in kwargs and name != "backbone_config"}
        merged = config_dict | replaced
        if "block_size" in replaced or has_one_block_size(merged):
            merged = {name: merged[name] for name in merged if name in replaced or name not in BLOCK_SIZES}
        return super().from_dict(merged, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the configuration, after a check that it can be loaded again.

        Raises:
            ValueError: if an attribute has been set to a value out of its range, or has the name of a misspelt field.
        """
        stored = self.to_dict()
        refuse_misspelt_fields(stored)
        type(self).from_dict(stored)
        super().save_pretrained(save_directory, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the backbone's embedding matrix."""
        return self.backbone_config.vocab_size

    @property
    def sequence_len(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self.question_len + self.plan_len + self.execution_len

    @property
    def has_plan(self) -> bool:
        """True if there is a plan between question and execution."""
        return self.plan_len > 0

    @property
    def is_flat(self) -> bool:
        """True if plan and execution are one run of tokens, without an edge between them."""
        return self.algorithm != "hier"

    @property
    def token_loss(self) -> str:
        """Name of the loss of each predicted token, one of `TOKEN_LOSSES`."""
        return {"sedd": "score_entropy", "ar": "next_token"}.get(self.algorithm, "nll")

    @property
    def blocks_hold_both_segments(self) -> bool:
        """True if tokens of plan and execution share noise levels."""
        return self.is_flat or self.joint or not self.hierarchical_mask

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's configuration, from which transformers reads vocabulary and layer sizes."""
        return self.backbone_config

    def _check_order(self) -> None:
        for name in ("question_len", "plan_len", "execution_len"):
            low = 0 if name == "question_len" else 2
            _check_integer(name, getattr(self, name), low, None, or_zero=name == "plan_len")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"`algorithm` must be one of {', '.join(ALGORITHMS)}, but got {self.algorithm!r}")
        for name, default in (("hierarchical_mask", True), ("joint", False), ("chat_template", None)):
            value = getattr(self, name)
            needs_default = default is not None and (self.is_flat or not self.has_plan)
            if not isinstance(value, bool) or (needs_default and value is not default):
                setting = f"algorithm={self.algorithm!r}" if self.is_flat else "plan_len=0"
                accepted = f"{default} for {setting}" if needs_default else "True or False"
                raise ValueError(f"`{name}` must be {accepted}, but got {value!r}")

    def _resolve_choice(self, name: str, choices: tuple[str, str]) -> str:
        """The first choice is the default, the second is what a causal language model has."""
        value, is_causal = getattr(self, name), self.algorithm == "ar"
        if value is None:
            return choices[is_causal]
        if value not in choices or (is_causal and value != choices[1]):
            accepted = f"{choices[1]} for algorithm='ar'" if is_causal else f"one of {', '.join(choices)}"
            raise ValueError(f"`{name}` must be {accepted}, but got {value!r}")
        return value

    def _resolve_block_size(self, name: str, block_size: int | None) -> int:
        value = getattr(self, name)
        if value is not None and block_size is not None and value != block_size:
            raise ValueError(f"`block_size` sets `{name}` too: got block_size={block_size!r} and {name}={value!r}")
        value = block_size if value is None else value
        needed = self._needed_block_size(name)
        if value is None:
            return 16 if needed is None else needed
        if needed is not None and value != needed:
            setting = f"algorithm={self.algorithm!r}" if self.is_flat else "joint=True"
            raise ValueError(f"`{name}` must be omitted or {needed} for {setting}, but got {value!r}")
        return value

    def _needed_block_size(self, name: str) -> int | None:
        """Return the only block size that the algorithm can have, or None."""
        if self.algorithm in ("mdlm", "sedd"):
            return self.plan_len + self.execution_len
        if self.algorithm == "ar":
            return 1
        return getattr(self, BLOCK_SIZES[name]) if self.joint else None

    def _check_fields(self) -> None:
        for segment in ("plan", "execution"):
            name, length = f"{segment}_block_size", getattr(self, f"{segment}_len")
            _check_divides(name, getattr(self, name), self.plan_len + self.execution_len if self.is_flat else length)
            _check_interval(f"{segment}_clip", getattr(self, f"{segment}_clip"))
        if self.is_flat:
            _check_equal("plan_block_size", self.plan_block_size, "execution_block_size", self.execution_block_size)
        if self.blocks_hold_both_segments:
            _check_equal("plan_clip", list(self.plan_clip), "execution_clip", list(self.execution_clip))
        self._check_steps()
        if self.noise not in NOISE_SCHEDULES:
            raise ValueError(f"`noise` must be one of {', '.join(NOISE_SCHEDULES)}, but got {self.noise!r}")
        if not _is_number(self.sampling_eps) or not 0 < self.sampling_eps < 1:
            raise ValueError(f"`sampling_eps` must be a number in (0, 1), but got {self.sampling_eps!r}")
        self._check_token_ids()
        longest, positions = self.sequence_len, getattr(self.backbone_config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"`question_len + plan_len + execution_len` must be at most the backbone's max_position_embeddings "
                f"{positions}, but got {self.question_len} + {self.plan_len} + {self.execution_len} = {longest}"
            )

    def _check_steps(self) -> None:
        """Check `execution_order` and what it needs."""
        if self.execution_order not in EXECUTION_ORDERS:
            accepted = " or ".join(EXECUTION_ORDERS)
            raise ValueError(f"`execution_order` must be {accepted}, but got {self.execution_order!r}")
        if self.execution_order == "chain":
            if self.step_len is not None:
                raise ValueError(f"`step_len` must be None for execution_order='chain', but got {self.step_len!r}")
            return
        for name, needed in (("algorithm", "hier"), ("hierarchical_mask", True), ("joint", False)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"`execution_order` must be 'chain' with {name}={getattr(self, name)!r}, but got 'plan'"
                )
        if not self.has_plan:
            raise ValueError(
                "`execution_order` must be 'chain' for a model without a plan (plan_len=0), but got 'plan'"
            )
        size, length = self.execution_block_size, self.execution_len
        _check_integer("step_len", self.step_len, 2, length // 2)
        if self.step_len % size or length % self.step_len:
            raise ValueError(
                f"`step_len` must be a multiple of execution_block_size={size} that divides execution_len={length}, "
                f"but got {self.step_len}"
            )

    def _check_token_ids(self) -> None:
        ids = {f"{role}_token_id": getattr(self, f"{role}_token_id") for role in (*SPECIAL_TOKENS, "pad")}
        for name, value in ids.items():
            _check_integer(name, value, 0, self.vocab_size - 1)
        names = list(ids)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                if ids[first] == ids[second] and (first, second) != ("end_token_id", "pad_token_id"):
                    raise ValueError(f"`{second}` must differ from `{first}`, but both are {ids[first]}")


def has_one_block_size(fields: Mapping[str, Any]) -> bool:
    """Return True if these fields of a configuration determine the block sizes."""
    return fields.get("algorithm") in SIZED_BY_ALGORITHM or bool(fields.get("joint"))


def _resolve_backbone_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"`backbone_config` must be a PreTrainedConfig, a dict or None, but got {type(value).__name__}"
        )
    _refuse_unknown_backbone_fields(value or {})
    return _make_backbone_config(value or {})


def _make_backbone_config(fields_and_type: Mapping[str, Any]) -> PreTrainedConfig:
    given = dict(fields_and_type)
    return AutoConfig.for_model(_check_model_type(given.pop("model_type", DEFAULT_BACKBONE)), **given)


def _check_model_type(model_type: str) -> str:
    if model_type == "hierbd3lm_dit":
        from .dit_hierbd3lm import HierBD3LMDiTConfig  # noqa: F401  (makes its `model_type` known to transformers)
    if model_type not in CONFIG_MAPPING or model_type == HierBD3LMConfig.model_type:
        raise ValueError(
            f"`backbone_config` must have a `model_type` that transformers knows, but got {model_type!r}"
            f"{did_you_mean(str(model_type), CONFIG_MAPPING)}"
        )
    return model_type


def _refuse_unknown_backbone_fields(fields_and_type: Mapping[str, Any]) -> None:
    """Refuse names that the backbone's configuration would store without reading them."""
    given = dict(fields_and_type)
    config_class = CONFIG_MAPPING[_check_model_type(given.pop("model_type", DEFAULT_BACKBONE))]
    known = {item.name for item in fields(config_class)} | {*config_class.attribute_map}
    known |= {*signature(config_class.__init__).parameters}
    _refuse_unknown_rope_parameters(config_class, given)
    config = config_class(**given)
    # Names of earlier versions, such as `rope_theta`, are read and not stored.
    stored = {name for name in given if name not in known and name in vars(config)}
    stored = {name for name in stored if not name.endswith("_token_id")}  # as in `_misspelt_fields`
    if stored:
        config = config_class(**{name: given[name] for name in given if name not in stored})
    _refuse_unknown(
        "backbone_config", config_class.__name__, [n for n in given if n in stored - {*dir(config)}], known
    )


def _refuse_unknown_rope_parameters(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> None:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    default = config_class(**{name: given[name] for name in given if name not in ("rope_parameters", "rope_scaling")})
    known = {*RopeParameters.__annotations__, *(getattr(default, "rope_parameters", None) or {}), "type"}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        names = [name for name, value in parameters.items() if not isinstance(value, dict)]
        _refuse_unknown("rope_parameters", "RopeParameters", names, known)


def config_fields() -> dict[str, str]:
    """Return the fields of [`HierBD3LMConfig`] with their help texts, `block_size` included."""
    helps = {item.name: item.metadata["help"] for item in fields(HierBD3LMConfig) if "help" in item.metadata}
    return helps | {"block_size": "Sets plan_block_size and execution_block_size at once; not stored."}


def refuse_misspelt_fields(names: Iterable[str]) -> None:
    """Refuse unknown names that are close to a field; others pass, as tools of the ecosystem store their own."""
    for name, match in _misspelt_fields(names).items():
        raise ValueError(f"`{name}` must be a field of HierBD3LMConfig, but is none; did you mean `{match}`?")


def _misspelt_fields(names: Iterable[str]) -> dict[str, str]:
    """Return the unknown names that are close to a field, with that field."""
    known = config_fields()
    # every tokenizer role has a name that ends so in transformers
    unknown = [name for name in names if name not in known and not name.endswith("_token_id")]
    matches = {name: get_close_matches(name, known, n=1, cutoff=0.8) for name in unknown}
    return {name: match[0] for name, match in matches.items() if match}


def _refuse_unknown(argument: str, owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"`{argument}` must have fields of {owner}, but got {name!r}{did_you_mean(name, known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_integer(name: str, value: object, low: int, high: int | None, or_zero: bool = False) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (value < low and not (or_zero and value == 0)) or (high is not None and value > high):
        accepted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"`{name}` must be {'0 or ' * or_zero}an integer {accepted}, but got {value!r}")


def _check_divides(name: str, block_size: object, segment_len: int) -> None:
    _check_integer(name, block_size, 1, segment_len or None)  # no length, no limit
    if segment_len % block_size:
        raise ValueError(f"`{name}` must divide the segment's length {segment_len}, but got {block_size}")


def _check_equal(name: str, value: object, other_name: str, other: object) -> None:
    if value != other:
        raise ValueError(f"`{name}` must equal `{other_name}`, as a block holds both segments: got {value}, {other}")


def _check_interval(name: str, value: object) -> None:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(bound) for bound in value)
    if not is_pair or not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"`{name}` must be two numbers with 0 <= low < high <= 1, but got {value!r}")


HierBD3LMConfig.register_for_auto_class()
if __name__.startswith("hierbd3lm."):  # not for code that a checkpoint brings along
    AutoConfig.register(HierBD3LMConfig.model_type, HierBD3LMConfig, exist_ok=True)
