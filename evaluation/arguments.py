"""Arguments of the evaluation commands. torch and transformers are only imported when one is created."""

import os
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from ..data.arguments import check_at_least, optional_fields, parse_json
from ..data.text.sets import TEXT_SETS
from ..settings_hierbd3lm import ATTENTIONS, SETTINGS, GenerationSettings

DTYPES = ("float32", "bfloat16", "float16")
NUM_SYNTHETIC = 300  # default number of problems
REFERENCE_PLANS = "reference"
PLAN_RANKINGS = ("likelihood", "agreement")
LIKELIHOOD_FILE = "likelihood.json"


@dataclass
class CheckpointArguments:
    """Checkpoint, dataset and device of an evaluation."""

    model: str = field(metadata={"help": "Folder or id of a checkpoint or an adapter, with its tokenizer."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`synthetic`, `gsm8k`, a .json, .jsonl or .txt file, a folder, a dataset on the Hub, or a set of "
            f"plain text: {', '.join(TEXT_SETS)}; defaults to the training data of the checkpoint."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; as in training if omitted."}
    )
    parse_example: str | None = field(
        default=None,
        metadata={
            "help": "Function `module:function` that makes question, plan, execution (and answer) from a row; as in "
            "training if omitted."
        },
    )
    split: str = field(
        default="test",
        metadata={
            "help": "train, validation or test; ood_longer and ood_wider too for `synthetic`. A file, or a dataset "
            "saved without splits, is a test split."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": f"Maximum number of examples; defaults to all, or {NUM_SYNTHETIC} for `synthetic`."},
    )
    batch_size: int = field(default=32, metadata={"help": "Batch size."})
    device: str | None = field(
        default=None, metadata={"help": "Device such as `cpu` or `cuda:0`; defaults to a GPU if there is one."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": f"Precision of the weights: {', '.join(DTYPES)}; as saved if omitted."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": f"Attention implementation: {', '.join(ATTENTIONS)}."}
    )

    def __post_init__(self):
        self.check_processes()
        for name in ("limit", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        for name, known in (("dtype", DTYPES), ("attn_implementation", ATTENTIONS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)} or None, but got {getattr(self, name)!r}"
                )
        if self.device is None:
            self.device = default_device()

    def check_processes(self) -> None:
        """Refuse several processes."""
        check_one_process()


# the stage follows from `given_plan`, and the seed has a default of its own
GivenSettings = make_dataclass("GivenSettings", optional_fields(GenerationSettings, without=("stage", "seed")))


@dataclass
class EvaluationArguments(GivenSettings, CheckpointArguments):
    """Arguments of `hierbd3lm eval`. Generation settings default to those of the checkpoint."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results; defaults to `eval` in the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete existing results in `output_dir`."})
    given_plan: str | None = field(
        default=None,
        metadata={
            "help": "Plans to execute: `reference`, or a .jsonl file with `question` and `plan`, such as the "
            "predictions.jsonl of another run."
        },
    )
    num_samples: int = field(
        default=1, metadata={"help": "Answers per example; more than one requires a temperature > 0."}
    )
    num_plans: int | None = field(
        default=None,
        metadata={"help": "Plans per example, of which the best are executed; requires a temperature > 0 if several."},
    )
    executions_per_plan: int = field(default=1, metadata={"help": "Executions of each plan; greedy if one."})
    plan_ranking: str = field(
        default="likelihood",
        metadata={"help": f"Score of a plan with `num_plans`: {', '.join(PLAN_RANKINGS)} (executes all plans)."},
    )
    num_executed_plans: int = field(default=1, metadata={"help": "Number of best plans that are executed."})
    num_examples_to_print: int = field(default=0, metadata={"help": "Number of examples to print at the end."})

    seed: int = field(default=0, metadata={"help": "Random seed; the seed of each batch is derived from it."})

    def __post_init__(self):
        super().__post_init__()
        ones = ("num_samples", "num_plans", "executions_per_plan", "num_executed_plans")
        for name, low in (*((name, 1) for name in ones), ("num_examples_to_print", 0)):
            check_at_least(name, getattr(self, name), low)
        if self.plan_ranking not in PLAN_RANKINGS:
            accepted = ", ".join(PLAN_RANKINGS)
            raise ValueError(f"`plan_ranking` must be one of {accepted}, but got {self.plan_ranking!r}")
        for name, default in (("num_samples", 1), ("given_plan", None)):
            if self.num_plans is not None and getattr(self, name) != default:
                raise ValueError(f"`{name}` must be {default} with `num_plans`, but got {getattr(self, name)!r}")
        for name in ("executions_per_plan", "num_executed_plans"):
            if self.num_plans is None and getattr(self, name) != 1:
                raise ValueError(f"`{name}` must be 1 without `num_plans`, but got {getattr(self, name)}")
        if self.given_plan not in (None, REFERENCE_PLANS) and not Path(self.given_plan).is_file():
            raise ValueError(f"`given_plan` must be {REFERENCE_PLANS!r} or a file, but got {self.given_plan!r}")
        if self.output_dir is None:
            self.output_dir = str(results_folder(self.model) / "eval")

    def plan_choice(self) -> dict[str, Any]:
        """Return the arguments of `PlanChoice`."""
        numbers = {"num_plans": self.num_plans, "executions_per_plan": self.executions_per_plan}
        return numbers | {"ranking": self.plan_ranking, "num_executed": self.num_executed_plans}

    def generation_settings(self) -> dict[str, Any]:
        """Return the given settings of HierBD3LMGenerationConfig; the stage follows from `given_plan`."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name, None) is not None}
        return given | {"stage": "full" if self.given_plan is None else "execution"}


@dataclass
class LikelihoodArguments(CheckpointArguments):
    """Arguments of `hierbd3lm ppl`."""

    text_column: str | None = field(
        default=None, metadata={"help": "Column of plain text in `dataset`; defaults to that of training."}
    )
    num_draws: int = field(default=8, metadata={"help": "Noise draws per example; >= 1."})
    exact: bool = field(
        default=False,
        metadata={"help": "Enumerate all masks instead of drawing noise, for blocks of at most 8 tokens."},
    )
    estimator: str = field(default="stratified", metadata={"help": "Estimator of the NELBO: stratified or bernoulli."})
    seed: int = field(default=0, metadata={"help": "Random seed of the noise."})
    output: str | None = field(
        default=None,
        metadata={"help": f"File for the results; defaults to {LIKELIHOOD_FILE} in the model's folder."},
    )

    def __post_init__(self):
        super().__post_init__()
        from ..diffusion_hierbd3lm import ESTIMATORS

        check_at_least("num_draws", self.num_draws, 1)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.output is None:
            self.output = str(results_folder(self.model) / LIKELIHOOD_FILE)


@dataclass
class AnalysisArguments(CheckpointArguments):
    """Arguments of `hierbd3lm analyze`. Generation settings are those of the checkpoint."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results; defaults to `analysis` in the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete existing results in `output_dir`."})
    num_draws: int = field(default=8, metadata={"help": "Noise draws per likelihood; >= 1."})
    seed: int = field(
        default=0, metadata={"help": "Random seed of exchanged and changed plans, generation and noise."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least("num_draws", self.num_draws, 1)
        if self.output_dir is None:
            self.output_dir = str(results_folder(self.model) / "analysis")


@dataclass
class SampleArguments:
    """Arguments of `hierbd3lm samples`: the scorer, and the samples or the model that generates them."""

    scorer: str = field(metadata={"help": "Folder or id of the autoregressive model, such as gpt2-large."})
    samples: str | None = field(default=None, metadata={"help": "A .jsonl file of texts, instead of `model`."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or id of a checkpoint that generates texts from an empty question."}
    )
    num_samples: int | None = field(default=None, metadata={"help": "Number of texts to generate with `model`."})
    settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Generation settings of `model` as JSON; default to those of the checkpoint."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed; the seed of each batch is derived from it."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the generated texts; defaults to `samples` in the model's folder."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete existing texts in `output_dir`."})
    text_field: str = field(default="text", metadata={"help": "Key of the text in each line of the samples."})
    context: int | None = field(
        default=None, metadata={"help": "Maximum context length of the scorer; defaults to its own maximum."}
    )
    batch_size: int = field(default=8, metadata={"help": "Batch size of generation and scoring."})
    device: str | None = field(
        default=None, metadata={"help": "Device such as `cpu` or `cuda:0`; defaults to a GPU if there is one."}
    )

    def __post_init__(self):
        check_one_process()
        if (self.samples is None) == (self.model is None) or (self.model is None) != (self.num_samples is None):
            raise ValueError(
                f"`samples`, or `model` with `num_samples`, must be given, but got samples={self.samples!r}, "
                f"model={self.model!r}, num_samples={self.num_samples!r}"
            )
        for name, low in (("num_samples", 1), ("batch_size", 1), ("context", 2)):
            check_at_least(name, getattr(self, name), low)
        self.settings = parse_json("settings", self.settings)
        if self.model is not None and self.output_dir is None:
            self.output_dir = str(results_folder(self.model) / "samples")
        if self.device is None:
            self.device = default_device()


def results_folder(model: str) -> Path:
    """Return the folder for results: that of the checkpoint, or for a Hub id one in `outputs/`.

    A folder named like the Hub id would hide the model on the Hub from the next run.
    """
    return Path(model) if Path(model).is_dir() else Path("outputs", str(model).replace("/", "--"))


def check_one_process(where: str = "") -> None:
    """Raise a ValueError if `torchrun` has started several processes, each of which would do all of the work."""
    if (num_processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"`WORLD_SIZE` must be 1, as this command runs in one process{where}, but got {num_processes}: only "
            f"`hierbd3lm lm-eval` and `hierbd3lm generate --output_dir` share their work among processes"
        )


def default_device() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
