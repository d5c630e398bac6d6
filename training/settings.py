"""The settings of training that are this package's own: the model's, an adapter's and the objective's.

Nothing heavy is imported before one is read, so that a command line can show them at once.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..data.arguments import parse_json

DTYPES = ("float32", "bfloat16", "float16", "auto")  # of weights; `auto` is that of the checkpoint
# of HierBD3LMConfig, where they are given
CONFIG_FIELDS = ("block_size", "plan_block_size", "execution_block_size", "question_len", "plan_len", "execution_len")
CONFIG_FIELDS += ("noise", "sampling_eps", "plan_clip", "execution_clip", "algorithm", "hierarchical_mask", "joint")
CONFIG_FIELDS += ("prediction", "question_attention")

CHAT_TEMPLATES = ("true", "false", "auto")

logger = logging.get_logger(__name__)


@dataclass
class AdapterArguments:
    """Settings of a LoRA adapter, with the names and defaults of TRL's ModelConfig."""

    use_peft: bool = field(
        default=False,
        metadata={"help": "Trains a LoRA adapter and the special tokens' embedding rows; all else is frozen."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices; >= 1."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's product is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter; in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that are adapted; every linear layer but the head if omitted."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )


@dataclass
class ModelArguments(AdapterArguments):
    """What is trained: an open checkpoint or a new backbone. What is omitted is as in HierBD3LMConfig."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "An autoregressive checkpoint, one of this model, or an adapter of one, to start from."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"Precision of the weights: {', '.join(DTYPES)}. `--bf16 true` computes in bfloat16, with weights "
            "in float32."
        },
    )
    backbone: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Configuration of a new backbone, as JSON: `model_type` (default qwen3) and its fields."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path or id of a tokenizer; that of `init_from`, or trained, if omitted."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Size of a trained byte-level BPE; every word is a token if omitted."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flex_attention."})
    algorithm: str | None = field(default=None, metadata={"help": "hier, bd3lm, mdlm, sedd or ar."})
    hierarchical_mask: bool | None = field(
        default=None, metadata={"help": "For `hier`: whether the plan never sees the execution."}
    )
    joint: bool | None = field(
        default=None, metadata={"help": "For `hier`: whether plan and execution are denoised at the same time."}
    )
    prediction: str | None = field(
        default=None,
        metadata={
            "help": "`in_place`: a hidden state predicts the token in its place; `shifted`: the next token, as in an "
            "autoregressive model. `shifted` for `ar` and converted checkpoints, else `in_place`, if omitted."
        },
    )
    question_attention: str | None = field(
        default=None,
        metadata={
            "help": "`bidirectional`, or `causal` as in an autoregressive model, which is the default for `ar` and "
            "converted checkpoints."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Sets both block sizes. Those of mdlm, sedd, ar and joint follow from the segments' lengths."
        },
    )
    plan_block_size: int | None = field(default=None, metadata={"help": "Tokens of a plan block."})
    execution_block_size: int | None = field(default=None, metadata={"help": "Tokens of an execution block."})
    question_len: int | None = field(default=None, metadata={"help": "Most tokens of a question."})
    plan_len: int | None = field(default=None, metadata={"help": "Most tokens of a plan."})
    execution_len: int | None = field(default=None, metadata={"help": "Most tokens of an execution."})
    chat_template: str = field(
        default="auto",
        metadata={
            "help": "Encode questions through the tokenizer's chat template: `true`, `false`, or `auto`, which is true"
            " for an open checkpoint whose tokenizer has a template, and as in `init_from` for one of this model."
        },
    )
    noise: str | None = field(default=None, metadata={"help": "Noise schedule."})
    sampling_eps: float | None = field(default=None, metadata={"help": "Least mask probability that is drawn."})
    plan_clip: list[float] | None = field(default=None, metadata={"help": "Mask rates of a plan block in training."})
    execution_clip: list[float] | None = field(
        default=None, metadata={"help": "Mask rates of an execution block in training."}
    )

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but got {self.dtype!r}")
        self.backbone = parse_json("backbone", self.backbone)
        if self.backbone is not None and self.init_from is not None:
            raise ValueError(f"`backbone` must be None with `init_from`, but got {self.backbone} and {self.init_from}")
        if self.use_peft and self.init_from is None:
            raise ValueError("`use_peft` must be False without `init_from`, but got True: an adapter needs a base")
        self.chat_template = str(self.chat_template).lower()  # YAML reads `true` as a bool
        if self.chat_template not in CHAT_TEMPLATES:
            raise ValueError(
                f"`chat_template` must be one of {', '.join(CHAT_TEMPLATES)}, but got {self.chat_template!r}"
            )

    def config_fields(self) -> dict[str, Any]:
        """The fields of HierBD3LMConfig that are given; block sizes only for an algorithm that can have several."""
        from ..configuration_hierbd3lm import BLOCK_SIZES, has_one_block_size

        values = {name: getattr(self, name) for name in CONFIG_FIELDS}
        given = {name: value for name, value in values.items() if value is not None}
        if self.chat_template != "auto":
            given["chat_template"] = self.chat_template == "true"
        if has_one_block_size(given):
            unused = {name: given.pop(name) for name in ("block_size", *BLOCK_SIZES) if name in given}
            logger.info(f"Block sizes follow from the algorithm; not used: {unused}")
        return given


@dataclass
class ObjectiveArguments:
    """Settings of the objective and its evaluation, and defaults that replace those of `TrainingArguments`."""

    estimator: str = field(
        default="stratified",
        metadata={"help": "Estimator of the NELBO: `stratified` mask counts or `bernoulli` (a time and coins)."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Trains the backbone's matrices by Muon at this rate, all else by AdamW; > 0."},
    )
    block_size_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Block sizes of plan and execution in the course of training, such as `{0: 1, 0.4: 2, 0.6: 4}`: "
            "each starts at a step (an integer) or at a fraction of the run (below 1), and divides the largest. None: "
            "block_size throughout."
        },
    )
    noisy_copies: int = field(
        default=1,
        metadata={
            "help": "Noisy copies of each example in a training pass; they share its clean tokens; >= 1. There is one "
            "where a block size of 1 leaves no noise."
        },
    )
    filler_weight: float = field(
        default=1.0,
        metadata={"help": "Weight in the training loss of the <|end|> tokens behind a segment's first; >= 0."},
    )
    clip_search: list[float] | None = field(
        default=None,
        metadata={
            "help": "Widths in (0, 1] of the intervals of mask rates, such as 0.5: every evaluation during training "
            "chooses that of least variance of the loss for each segment. None: the intervals stay as they are."
        },
    )
    clip_search_levels: int = field(
        default=20,
        metadata={"help": "Mask rates that a search measures, a pass each; the intervals start and end between them."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Decay of the weights' average, used to evaluate and to save; in [0, 1), 0 for none."},
    )
    stop_if_not_finite: bool = field(
        default=True,
        metadata={
            "help": "Stops at the first loss, or weight at a save, that is NaN or infinite. Nothing is saved then. "
            "False continues."
        },
    )
    eval_noise_draws: int = field(
        default=4, metadata={"help": "Draws of the noise for each example of an evaluation; >= 1."}
    )
    eval_seed: int = field(default=0, metadata={"help": "Seed of the noise of every evaluation."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "As in TrainingArguments; grouped by length here."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "As in TrainingArguments; the collator reads columns that the model lacks."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "As in TrainingArguments, where it was gradient_checkpointing before 5.23."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "As in TrainingArguments; a loss that is not finite is shown here."}
    )
