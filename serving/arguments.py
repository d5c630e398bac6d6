"""Arguments of `hierbd3lm generate` and `serve`. torch and transformers are only imported when one is created."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import takewhile
from typing import Any

from ..data.arguments import check_at_least, optional_fields
from ..evaluation.arguments import DTYPES, CheckpointArguments, check_one_process, default_device
from ..settings_hierbd3lm import SETTINGS, GenerationSettings

STDIN = "-"
API_KEY_VARIABLE = "HIERBD3LM_API_KEY"
SOURCES = ("question", "questions", "dataset")

# the stage follows from `plan`
ChosenSettings = make_dataclass("ChosenSettings", optional_fields(GenerationSettings, without=("stage",)))


@dataclass
class GenerateArguments(ChosenSettings, CheckpointArguments):
    """Arguments of `hierbd3lm generate`. Generation settings default to those of the checkpoint."""

    question: str | None = field(
        default=None,
        metadata={"help": "Question; without any on a terminal a chat begins, elsewhere stdin has the questions."},
    )
    questions: str | None = field(
        default=None,
        metadata={
            "help": "File of questions: one per line, or rows with `question` (.jsonl, .json, .csv); `-` is stdin."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset whose questions are answered: what `hierbd3lm eval` takes."},
    )
    plan: str | None = field(default=None, metadata={"help": "Plan that `question` is executed with."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object per answer."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the answers to `questions` or `dataset`. The same command resumes there."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete existing answers in `output_dir`."})

    def __post_init__(self):
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[1]}` must not be given with `{given[0]}`: they are two sources of questions")
        if self.output_dir is not None and self.questions is None and self.dataset is None:
            raise ValueError("`questions` or `dataset` must be given for `output_dir`, but neither is")
        if self.plan is not None and self.question is None:
            raise ValueError("`question` must be given for `plan`, but is not")
        super().__post_init__()

    def check_processes(self) -> None:
        """Refuse several processes, unless they share a folder of answers."""
        if self.output_dir is None:
            check_one_process(" without `--output_dir`")

    def generation_settings(self) -> dict[str, Any]:
        """Return the given settings of HierBD3LMGenerationConfig."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name, None) is not None}
        return given | {"stage": "full" if self.plan is None else "execution"}


@dataclass
class ServeArguments(ChosenSettings):
    """Arguments of `hierbd3lm serve`. Generation settings are those of requests that give none."""

    model: str = field(kw_only=True, metadata={"help": "Folder or id of a checkpoint or an adapter."})
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 is every one of this machine."}
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 chooses a free one."})
    served_name: str | None = field(
        default=None, metadata={"help": "Name of the model in the API; `model` if omitted."}
    )
    api_key: str | None = field(
        default=None, metadata={"help": f"Key that requests to /v1/ must have; ${API_KEY_VARIABLE} if omitted."}
    )
    batch_size: int = field(default=16, metadata={"help": "Most answers generated at the same time."})
    max_queue: int = field(default=256, metadata={"help": "Most questions that wait; others get status 429."})
    timeout: float = field(default=120.0, metadata={"help": "Most seconds of a request; then it gets status 504."})
    max_body_bytes: int = field(
        default=1_000_000, metadata={"help": "Most bytes of a request; larger ones get status 413."}
    )
    body_timeout: float = field(
        default=10.0, metadata={"help": "Most seconds in which a request must have been received."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Device such as `cpu` or `cuda:0`; defaults to a GPU if there is one."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": f"Precision of the weights: {', '.join(DTYPES)}; as saved if omitted."}
    )

    def __post_init__(self):
        check_one_process()
        for name, low in (("batch_size", 1), ("max_queue", 1), ("max_body_bytes", 1), ("port", 0)):
            check_at_least(name, getattr(self, name), low)
        for name in ("timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be more than 0 seconds, but got {getattr(self, name)}")
        if self.port > 65535:
            raise ValueError(f"`port` must be at most 65535, but got {self.port}")
        if self.api_key is None:
            self.api_key = os.environ.get(API_KEY_VARIABLE)
        if self.api_key == "":
            raise ValueError("`api_key` must not be empty, but is: leave it out for none")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)} or None, but got {self.dtype!r}")
        if self.served_name is None:
            self.served_name = self.model
        if self.device is None:
            self.device = default_device()

    def generation_settings(self) -> dict[str, Any]:
        """Return the given settings of HierBD3LMGenerationConfig."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name, None) is not None}


def place_words(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Turn the words before the first flag into values of the flags `names`: `DIR` becomes `--model DIR`.

    Raises:
        ValueError: for more words than names.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if len(words) > len(names):
        raise ValueError(
            f"`{names[-1]}` must be one argument, but got {' '.join(words[len(names) - 1 :])!r}: put it in quotes"
        )
    placed = [part for name, word in zip(names, words, strict=False) for part in (f"--{name}", word)]
    return placed + list(argv[len(words) :])
