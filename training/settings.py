"""Training settings of this package: of the model, an adapter, the objective and its evaluation.

The module imports no heavy package, so that `--help` is fast.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..data.arguments import parse_json

DTYPES = ("float32", "bfloat16", "float16", "auto")  # of weights; `auto`: as in the checkpoint
# fields of HierBD3LMConfig; a field that is omitted keeps its default
CONFIG_FIELDS = ("block_size", "plan_block_size", "execution_block_size", "question_len", "plan_len", "execution_len")
CONFIG_FIELDS += ("noise", "sampling_eps", "plan_clip", "execution_clip", "algorithm", "hierarchical_mask", "joint")
CONFIG_FIELDS += ("prediction", "question_attention", "execution_order", "step_len")

CHAT_TEMPLATES = ("true", "false", "auto")

logger = logging.get_logger(__name__)


@dataclass
class AdapterArguments:
    """Settings of a LoRA adapter, with the names and defaults of TRL's ModelConfig."""

    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train a LoRA adapter and the embedding rows of the special tokens; freeze all other weights."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices, >= 1."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scaling: lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout probability of the LoRA layers, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the modules to adapt; all linear layers except the head if omitted."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that are fully trained and saved with the adapter."}
    )


@dataclass
class ModelArguments(AdapterArguments):
    """The model to train: a checkpoint or a new backbone. Omitted fields have the defaults of HierBD3LMConfig."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to start from: autoregressive, of this model, or a LoRA adapter of one."},
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
        default=None,
        metadata={"help": "Path or Hub id of the tokenizer. If omitted: the tokenizer of `init_from`, or a new one."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Vocabulary size of a new byte-level BPE tokenizer; word-level if omitted."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation: sdpa, eager or flex_attention."}
    )
    algorithm: str | None = field(default=None, metadata={"help": "Algorithm: hier, bd3lm, mdlm, sedd or ar."})
    hierarchical_mask: bool | None = field(
        default=None, metadata={"help": "For `hier`: hide the execution from the plan."}
    )
    joint: bool | None = field(
        default=None, metadata={"help": "For `hier`: denoise plan and execution at the same time."}
    )
    execution_order: str | None = field(
        default=None,
        metadata={
            "help": "`chain`: blocks of the execution in their order. `plan`, for `hier`: steps see only the steps "
            "that they need by the plan, and independent ones are denoised at the same time."
        },
    )
    step_len: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of a step, for `execution_order` plan."}
    )
    prediction: str | None = field(
        default=None,
        metadata={
            "help": "Token that a hidden state predicts: the one at its position (`in_place`) or the next one "
            "(`shifted`), as in an autoregressive model. Default: `shifted` for `ar` and converted checkpoints, else "
            "`in_place`."
        },
    )
    question_attention: str | None = field(
        default=None,
        metadata={
            "help": "Attention within the question: `bidirectional` or `causal`. Default: `causal` for `ar` and "
            "converted checkpoints, else `bidirectional`."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Block size of plan and execution. For mdlm, sedd, ar and joint it follows from the lengths."
        },
    )
    plan_block_size: int | None = field(default=None, metadata={"help": "Number of tokens of a plan block."})
    execution_block_size: int | None = field(
        default=None, metadata={"help": "Number of tokens of an execution block."}
    )
    question_len: int | None = field(default=None, metadata={"help": "Maximum number of question tokens."})
    plan_len: int | None = field(
        default=None, metadata={"help": "Maximum number of plan tokens, with <|plan|> and <|end|>."}
    )
    execution_len: int | None = field(
        default=None, metadata={"help": "Maximum number of execution tokens, with <|execution|> and <|end|>."}
    )
    chat_template: str = field(
        default="auto",
        metadata={
            "help": "Encode questions through the tokenizer's chat template: `true`, `false`, or `auto`, which is true"
            " for an open checkpoint whose tokenizer has a template, and as in `init_from` for one of this model."
        },
    )
    noise: str | None = field(default=None, metadata={"help": "Noise schedule: loglinear, square, cosine or log."})
    sampling_eps: float | None = field(
        default=None, metadata={"help": "Minimum mask probability of the Bernoulli estimator, in (0, 1)."}
    )
    plan_clip: list[float] | None = field(
        default=None, metadata={"help": "Interval of mask rates of plan blocks in training."}
    )
    execution_clip: list[float] | None = field(
        default=None, metadata={"help": "Interval of mask rates of execution blocks in training."}
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
        """Return the given fields of HierBD3LMConfig, without block sizes if the algorithm determines them."""
        from ..configuration_hierbd3lm import BLOCK_SIZES, has_one_block_size

        values = {name: getattr(self, name) for name in CONFIG_FIELDS}
        given = {name: value for name, value in values.items() if value is not None}
        if self.chat_template != "auto":
            given["chat_template"] = self.chat_template == "true"
        if has_one_block_size(given):
            unused = {name: given.pop(name) for name in ("block_size", *BLOCK_SIZES) if name in given}
            logger.info(f"The algorithm determines the block sizes; ignored: {unused}")
        return given


@dataclass
class ObjectiveArguments:
    """Settings of the objective and its evaluation, and defaults that replace those of `TrainingArguments`."""

    estimator: str = field(
        default="stratified",
        metadata={
            "help": "Estimator of the NELBO: `stratified` numbers of masked tokens, or `bernoulli` (tokens are masked "
            "independently at a random time)."
        },
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of Muon for the backbone's matrices, > 0; AdamW trains the other weights."},
    )
    block_size_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Block sizes during training, such as `{0: 1, 0.4: 2, 0.6: 4}`. A key is a step (an integer) or a "
            "fraction of the run (below 1); every size divides the largest. None: a constant block size."
        },
    )
    noisy_copies: int = field(
        default=1,
        metadata={
            "help": "Number of noisy copies of each example in a training pass, >= 1; they share its clean tokens. "
            "One copy is used where a block size of 1 leaves no noise."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack the examples of a batch into fewer, longer rows with hardly any padding. Loss and gradient "
            "are those of the same batch without packing."
        },
    )
    filler_weight: float = field(
        default=1.0,
        metadata={"help": "Weight in the training loss of the <|end|> tokens after the first of a segment, >= 0."},
    )
    clip_search: list[float] | None = field(
        default=None,
        metadata={
            "help": "Widths in (0, 1] of the intervals of mask rates to search, such as 0.5. Every evaluation during "
            "training selects the interval with the lowest variance of the loss for each segment. None: no search."
        },
    )
    clip_search_levels: int = field(
        default=20,
        metadata={"help": "Number of bins of mask rates in a clip search, >= 1; each is measured in one pass."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={
            "help": "Decay of the exponential moving average of the weights, in [0, 1); 0 for none. The averaged "
            "weights are evaluated and saved."
        },
    )
    stop_if_not_finite: bool = field(
        default=True,
        metadata={"help": "Stop at the first loss that is NaN or infinite, and before such weights are saved."},
    )
    eval_noise_draws: int = field(
        default=4, metadata={"help": "Number of noise draws per example in an evaluation, >= 1."}
    )
    eval_seed: int = field(default=0, metadata={"help": "Random seed of the noise in evaluations."})
    eval_answers: int = field(
        default=0,
        metadata={
            "help": "Maximum number of validation problems that every evaluation answers: `eval_exact_match`, >= 0."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "As in TrainingArguments, but `group_by_length` by default."}
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "As in TrainingArguments, but False by default: the collator reads all columns."},
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "As in TrainingArguments (`gradient_checkpointing` before transformers 5.23)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "As in TrainingArguments, but False by default: NaN and infinite losses are logged."},
    )
