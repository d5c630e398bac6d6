"""The settings of every command that evaluates. Nothing heavy is imported before one is read."""

import json
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from ..data.arguments import check_at_least, optional_fields
from ..data.text.sets import TEXT_SETS
from ..settings_hierbd3lm import SETTINGS, GenerationSettings

NUM_SYNTHETIC = 300  # problems, unless `--limit` says otherwise
REFERENCE_PLANS = "reference"
LIKELIHOOD_FILE = "likelihood.json"


@dataclass
class CheckpointArguments:
    """What is evaluated, on what and where."""

    model: str = field(metadata={"help": "Folder or id of a checkpoint or an adapter, with its tokenizer."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`synthetic`, `gsm8k`, a .json, .jsonl or .txt file, a folder, a dataset on the Hub, or a set of "
            f"plain text: {', '.join(TEXT_SETS)}; what the checkpoint was trained on if omitted."
        },
    )
    split: str = field(
        default="test",
        metadata={
            "help": "train, validation or test; ood_longer and ood_wider too for `synthetic`. A file is `test`."
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": f"The first so many examples; if omitted, all, or {NUM_SYNTHETIC} for `synthetic`."},
    )
    batch_size: int = field(default=32, metadata={"help": "Examples that go through the model together."})
    device: str | None = field(default=None, metadata={"help": "Such as `cpu` or `cuda:0`; a GPU if there is one."})

    def __post_init__(self):
        for name in ("limit", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.device is None:
            self.device = default_device()


# the stage follows from `given_plan`, and the seed has a default of its own
GivenSettings = make_dataclass("GivenSettings", optional_fields(GenerationSettings, without=("stage", "seed")))


@dataclass
class EvaluationArguments(GivenSettings, CheckpointArguments):
    """What is evaluated, on what, and how it generates. A generation setting that is omitted is the checkpoint's."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results; `eval` in `model`."})
    overwrite: bool = field(default=False, metadata={"help": "Throws away the results that `output_dir` holds."})
    given_plan: str | None = field(
        default=None,
        metadata={
            "help": "Plans that the execution is generated from: `reference`, or a .jsonl file of `question` and "
            "`plan`, such as the predictions.jsonl of another run."
        },
    )
    num_samples: int = field(
        default=1, metadata={"help": "Answers to each example; several ask for a temperature > 0."}
    )
    num_examples_to_print: int = field(default=0, metadata={"help": "Examples that are printed at the end."})

    seed: int = field(default=0, metadata={"help": "Of the random draws; one of its own per batch follows from it."})

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("num_samples", 1), ("num_examples_to_print", 0)):
            check_at_least(name, getattr(self, name), low)
        if self.given_plan not in (None, REFERENCE_PLANS) and not Path(self.given_plan).is_file():
            raise ValueError(f"`given_plan` must be {REFERENCE_PLANS!r} or a file, but got {self.given_plan!r}")
        if self.output_dir is None:
            self.output_dir = str(Path(self.model, "eval"))

    def generation_settings(self) -> dict[str, Any]:
        """The settings of HierBD3LMGenerationConfig that are given; the stage follows from `given_plan`."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name, None) is not None}
        return given | {"stage": "full" if self.given_plan is None else "execution"}


@dataclass
class LikelihoodArguments(CheckpointArguments):
    """What is measured, and how."""

    text_column: str | None = field(
        default=None, metadata={"help": "Column of plain text in `dataset`; as in training if omitted."}
    )
    num_draws: int = field(default=8, metadata={"help": "Draws of the noise for each example; >= 1."})
    exact: bool = field(
        default=False, metadata={"help": "Enumerates all masks instead, for blocks of at most 8 tokens."}
    )
    estimator: str = field(default="stratified", metadata={"help": "stratified or bernoulli."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    output: str | None = field(default=None, metadata={"help": f"File of the results; {LIKELIHOOD_FILE} in `model`."})

    def __post_init__(self):
        super().__post_init__()
        from ..diffusion_hierbd3lm import ESTIMATORS

        check_at_least("num_draws", self.num_draws, 1)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, but got {self.estimator!r}")
        if self.output is None:
            self.output = str(Path(self.model, LIKELIHOOD_FILE))


@dataclass
class AnalysisArguments(CheckpointArguments):
    """What is analysed, and how. Generation settings are the checkpoint's."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results; `analysis` in `model`."})
    overwrite: bool = field(default=False, metadata={"help": "Throws away the results that `output_dir` holds."})
    num_draws: int = field(default=8, metadata={"help": "Draws of the noise that a likelihood averages over; >= 1."})
    seed: int = field(default=0, metadata={"help": "Of exchanged and changed plans, generation and noise."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("num_draws", self.num_draws, 1)
        if self.output_dir is None:
            self.output_dir = str(Path(self.model, "analysis"))


@dataclass
class SampleArguments:
    """Which texts are judged, or which model writes them first, and who scores them."""

    scorer: str = field(metadata={"help": "Folder or id of the autoregressive model, such as gpt2-large."})
    samples: str | None = field(default=None, metadata={"help": "A .jsonl file of texts; in place of `model`."})
    model: str | None = field(
        default=None, metadata={"help": "Folder of a checkpoint, which writes texts from an empty question."}
    )
    num_samples: int | None = field(default=None, metadata={"help": "Texts that `model` writes."})
    settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Generation settings of `model`, as JSON; those of the checkpoint where they are omitted."},
    )
    seed: int = field(default=0, metadata={"help": "Of what `model` writes; each batch's seed follows from it."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of what `model` writes; `samples` in it if omitted."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Throws away the texts that `output_dir` holds."})
    text_field: str = field(default="text", metadata={"help": "Key of the text in a line of the samples."})
    context: int | None = field(
        default=None, metadata={"help": "Most tokens that the scorer reads at once; what it can if omitted."}
    )
    batch_size: int = field(default=8, metadata={"help": "Texts that are written, or scored, together."})
    device: str | None = field(default=None, metadata={"help": "Such as `cpu` or `cuda:0`; a GPU if there is one."})

    def __post_init__(self):
        if (self.samples is None) == (self.model is None) or (self.model is None) != (self.num_samples is None):
            raise ValueError(
                f"`samples`, or `model` with `num_samples`, must be given, but got samples={self.samples!r}, "
                f"model={self.model!r}, num_samples={self.num_samples!r}"
            )
        for name, low in (("num_samples", 1), ("batch_size", 1), ("context", 2)):
            check_at_least(name, getattr(self, name), low)
        if isinstance(self.settings, str):
            self.settings = json.loads(self.settings)
        if self.model is not None and self.output_dir is None:
            self.output_dir = str(Path(self.model, "samples"))
        if self.device is None:
            self.device = default_device()


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
