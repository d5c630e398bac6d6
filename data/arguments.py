"""Settings of the data, shared by training and evaluation."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .synthetic.config import SyntheticConfig
from .text.detokenization import RULES

SYNTHETIC = "synthetic"  # what `dataset` says for the synthetic problems
GSM8K_IDS = ("openai/gsm8k", "gsm8k")
TEXT = "text"  # the column of plain text
UNFIT = ("drop", "raise")  # what may be done with an example that cannot be used
FILE_NAME = "data_config.json"  # in the folder of a checkpoint: its training data


@dataclass
class DataArguments:
    """The data of a run."""

    dataset: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "`synthetic`, `openai/gsm8k`, a .json, .jsonl, .csv or .parquet file, a .txt file of plain text "
            "with one document per line, a folder, or a dataset on the Hub."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; for GSM8K `main` or `socratic`."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    parse_example: str | None = field(
        default=None,
        metadata={
            "help": "Function `module:function` that makes `question`, `plan`, `execution` (and `answer`) from a row. "
            "Rows with `messages`, or with `prompt` and `completion`, need none."
        },
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of plain text, for a model without question and plan (`plan_len: 0`); `text` for a .txt "
            "file."
        },
    )
    wrap: bool = field(
        default=True,
        metadata={
            "help": "Plain text: concatenate documents and cut them into rows; otherwise each has its own rows."
        },
    )
    detokenizer: str | None = field(
        default=None,
        metadata={"help": f"Plain text: detokenization rules, {', '.join(RULES)}; none if omitted."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Plain text: stream the training split, in its order, instead of loading it."},
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={"help": "Size of the buffer that documents of a stream are sampled from; 0 keeps their order."},
    )
    synthetic: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of SyntheticConfig, as JSON, for synthetic problems."}
    )
    num_synthetic_examples: int = field(
        default=0, metadata={"help": "Number of synthetic problems added to the training examples of another dataset."}
    )
    counterfactual_plans: float = field(
        default=0.0,
        metadata={
            "help": "Probability that the plan of a training example is changed and its execution recomputed; the "
            "loss counts for the execution alone. For synthetic problems and GSM8K."
        },
    )
    plan_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability that a training example has no plan; the loss counts for the execution alone."},
    )
    dataset_train_split: str | None = field(default="train", metadata={"help": "Name of the training split."})
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Name of the validation split; if omitted, the end of the training split is held out."},
    )
    dataset_test_split: str | None = field(default="test", metadata={"help": "Name of the test split."})
    num_train_examples: int | None = field(
        default=None, metadata={"help": "Maximum number of training examples; required for `dataset: synthetic`."}
    )
    num_validation_examples: int = field(
        default=256,
        metadata={"help": "Number of validation examples, or documents; 0 for no validation."},
    )
    tested_on: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with a test split: near-duplicates of its problems are removed from training and "
            "validation. GSM8K by default if it is the training data."
        },
    )
    auto_split: bool = field(
        default=False,
        metadata={"help": "Split examples that have only a `text` at 25 %% and 50 %% of their tokens."},
    )
    fixed_length: bool = field(
        default=False,
        metadata={"help": "Pad every segment to its maximum length instead of the longest in the batch."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes for encoding; one if omitted."}
    )
    special_tokens: str = field(
        default="drop",
        metadata={
            "help": "`drop` (and count) or `raise`, for examples whose text spells out a special token of the layout, "
            "such as <|plan|>."
        },
    )
    over_long: str = field(default="drop", metadata={"help": "`drop` (and count) or `raise`, for over-long examples."})

    def __post_init__(self):
        self.synthetic = parse_json("synthetic", self.synthetic) or {}
        check_names("synthetic", self.synthetic, [item.name for item in fields(SyntheticConfig)])
        if self.tested_on is None and self.dataset in GSM8K_IDS:
            self.tested_on = self.dataset
        if self.text_column is None and self.dataset.endswith(".txt") and not self.auto_split:
            self.text_column = TEXT
        if self.text_column is None:
            for name, default in (("streaming", False), ("detokenizer", None)):
                self._check_default(name, default, "without `text_column`")
        else:
            for name, default in (("auto_split", False), ("num_synthetic_examples", 0), ("tested_on", None)):
                self._check_default(name, default, f"for plain text, `text_column={self.text_column}`")
            self._check_default("parse_example", None, f"for plain text, `text_column={self.text_column}`")
        if self.dataset == SYNTHETIC:
            for name in ("dataset_name", "dataset_revision", "parse_example"):
                self._check_default(name, None, f"for `dataset: {SYNTHETIC}`")
        for name in ("special_tokens", "over_long"):
            if getattr(self, name) not in UNFIT:
                raise ValueError(f"`{name}` must be one of {', '.join(UNFIT)}, but got {getattr(self, name)!r}")
        if self.detokenizer is not None and self.detokenizer not in RULES:
            raise ValueError(f"`detokenizer` must be one of {', '.join(RULES)}, but got {self.detokenizer!r}")
        if not self.streaming:
            self._check_default("shuffle_buffer", 0, "without `streaming`")
        check_at_least("num_train_examples", self.num_train_examples, 1)
        for name in ("num_validation_examples", "num_synthetic_examples", "shuffle_buffer"):
            check_at_least(name, getattr(self, name), 0)
        self._check_given_plans()
        if self.dataset == SYNTHETIC and self.num_synthetic_examples:
            raise ValueError(
                f"`num_synthetic_examples` must be 0 for `dataset: synthetic`, but got {self.num_synthetic_examples}"
            )

    def _check_given_plans(self) -> None:
        """Check the probabilities of plans that are given in training."""
        for name in ("counterfactual_plans", "plan_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], but got {getattr(self, name)}")
            if self.text_column is not None or self.auto_split:
                self._check_default(name, 0, "for data without plans")
        if self.counterfactual_plans + self.plan_dropout > 1:
            raise ValueError(
                f"`counterfactual_plans + plan_dropout` must be at most 1, but got {self.counterfactual_plans} + "
                f"{self.plan_dropout}"
            )
        has_synthetic = self.dataset == SYNTHETIC or self.num_synthetic_examples > 0
        has_solutions = self.dataset in GSM8K_IDS and self.dataset_name in (None, "main") and not self.parse_example
        if not has_synthetic and not has_solutions:
            self._check_default("counterfactual_plans", 0, "for other data than synthetic problems and GSM8K's `main`")

    def _check_default(self, name: str, default: Any, where: str) -> None:
        if getattr(self, name) != default:
            raise ValueError(f"`{name}` must be {default} {where}, but got {getattr(self, name)!r}")

    def save(self, folder: str) -> None:
        """Save the arguments to the folder of a checkpoint."""
        Path(folder, FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, model: str) -> "DataArguments":
        """Load the arguments that a checkpoint was trained with.

        Args:
            model: folder of a run, of one of its checkpoints, or Hub id.

        Raises:
            ValueError: if the file with the arguments is missing.
        """
        path = find_saved_arguments(model)
        if path is None:
            raise ValueError(f"`model` must have {FILE_NAME}, which says what it was trained on, but got {model!r}")
        saved = json.loads(path.read_text(encoding="utf-8"))
        check_names(FILE_NAME, saved, [item.name for item in fields(cls)])
        return cls(**saved)


def find_saved_arguments(model: str) -> Path | None:
    """Find the file that [`DataArguments.save`] wrote, in a folder or on the Hub; None if there is none.

    A run's `checkpoint-N` without the file has the arguments of the run, in the folder above.
    """
    from transformers.utils import cached_file

    missing_is_none = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(str(model), FILE_NAME, **missing_is_none)
    if found is None and Path(model).is_dir() and Path(model).absolute().name.startswith("checkpoint-"):
        found = cached_file(str(Path(model).absolute().parent), FILE_NAME, **missing_is_none)
    return None if found is None else Path(found)


def optional_fields(source: type, without: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return the fields of a dataclass as `make_dataclass` takes them, each None unless it is given."""
    return [
        (item.name, item.type | None, field(default=None, metadata=item.metadata))
        for item in fields(source)
        if item.name not in without
    ]


def parse_json(name: str, value: Any) -> Any:
    """Return the value of a setting that may be given as JSON.

    Raises:
        ValueError: if it is a text and not JSON.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, but got {value!r}: {error}") from error


def check_names(setting: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ValueError for a name inside a nested setting that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            nearest = "".join(f"; did you mean `{match}`?" for match in get_close_matches(name, known, n=1))
            raise ValueError(f"`{setting}` must have fields of {', '.join(known)}, but got {name!r}{nearest}")


def check_at_least(name: str, value: int | None, low: int) -> None:
    """Raise a ValueError for a setting that is given and less than `low`."""
    if value is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value}")
