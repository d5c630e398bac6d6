"""The settings of the data, shared by training and evaluation."""

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
FILE_NAME = "data_config.json"  # beside a checkpoint: what it was trained on


@dataclass
class DataArguments:
    """What a run reads."""

    dataset: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "`synthetic`, `openai/gsm8k`, a .json or .jsonl file, a .txt file of plain text with a document a "
            "line, a folder, or a dataset on the Hub."
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
            "help": "Column of plain text, which a model without a question and a plan (`plan_len: 0`) is trained "
            "on; `text` for a .txt file."
        },
    )
    wrap: bool = field(
        default=True,
        metadata={"help": "Plain text: joins documents and cuts them into rows, else each has rows of its own."},
    )
    detokenizer: str | None = field(
        default=None,
        metadata={"help": f"Plain text: rules that put words together again, {', '.join(RULES)}; none if omitted."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Plain text: reads the training split while it trains, in its order, without a copy of it."},
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={"help": "Documents of a stream that the next one is drawn from; 0 keeps the stream's order."},
    )
    synthetic: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of SyntheticConfig, as JSON, for the synthetic problems."}
    )
    num_synthetic_examples: int = field(
        default=0, metadata={"help": "Synthetic problems that are trained on beside another dataset; 0 for none."}
    )
    dataset_train_split: str | None = field(default="train", metadata={"help": "Name of the training split."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Name of the validation split; held out of the training split if omitted."}
    )
    dataset_test_split: str | None = field(default="test", metadata={"help": "Name of the test split."})
    num_train_examples: int | None = field(
        default=None, metadata={"help": "The first so many training examples; needed for `dataset: synthetic`."}
    )
    num_validation_examples: int = field(
        default=256,
        metadata={"help": "Examples, or documents, that the likelihood is measured on; 0 for no validation."},
    )
    tested_on: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with the test split that training must stay clear of: near-duplicates of its problems "
            "are left out. GSM8K itself if it is trained on."
        },
    )
    auto_split: bool = field(
        default=False,
        metadata={"help": "Splits examples that are a `text` alone at 25 %% and 50 %% of their tokens."},
    )
    fixed_length: bool = field(
        default=False, metadata={"help": "Pads every segment to its greatest length, not to what a batch needs."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that encode; one if omitted."})
    special_tokens: str = field(
        default="drop",
        metadata={
            "help": "What is done with examples whose text spells out a special token of the layout, such as "
            "<|plan|>: `drop` (and count) or `raise`."
        },
    )
    over_long: str = field(
        default="drop", metadata={"help": "What is done with over-long examples: `drop` (and count) or `raise`."}
    )

    def __post_init__(self):
        self.synthetic = json.loads(self.synthetic) if isinstance(self.synthetic, str) else self.synthetic or {}
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
        if self.detokenizer is not None and self.detokenizer not in RULES:
            raise ValueError(f"`detokenizer` must be one of {', '.join(RULES)}, but got {self.detokenizer!r}")
        if not self.streaming:
            self._check_default("shuffle_buffer", 0, "without `streaming`")
        check_at_least("num_train_examples", self.num_train_examples, 1)
        for name in ("num_validation_examples", "num_synthetic_examples", "shuffle_buffer"):
            check_at_least(name, getattr(self, name), 0)
        if self.dataset == SYNTHETIC and self.num_synthetic_examples:
            raise ValueError(
                f"`num_synthetic_examples` must be 0 for `dataset: synthetic`, but got {self.num_synthetic_examples}"
            )

    def _check_default(self, name: str, default: Any, where: str) -> None:
        if getattr(self, name) != default:
            raise ValueError(f"`{name}` must be {default} {where}, but got {getattr(self, name)!r}")

    def save(self, folder: str) -> None:
        """Writes the arguments beside a checkpoint."""
        Path(folder, FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, model: str) -> "DataArguments":
        """Load what a checkpoint was trained on.

        Args:
            model: folder of a run, of one of its checkpoints, or Hub id.

        Raises:
            ValueError: if the file with the arguments is missing.
        """
        path = find_saved_arguments(model)
        if path is None:
            raise ValueError(f"`model` must have {FILE_NAME}, which says what it was trained on, but got {model!r}")
        return cls(**json.loads(path.read_text()))


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


def check_names(setting: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ValueError for a name inside a nested setting that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            nearest = "".join(f"; did you mean `{match}`?" for match in get_close_matches(name, known, n=1))
            raise ValueError(f"`{setting}` must have fields of {', '.join(known)}, but got {name!r}{nearest}")


def check_at_least(name: str, value: int | None, low: int) -> None:
    """Raises a ValueError for a setting that is given and less than `low`."""
    if value is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value}")
