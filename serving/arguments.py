"""Arguments of `hierbd3lm generate`. torch and transformers are only imported when one is created."""

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import takewhile
from typing import Any

from ..data.arguments import optional_fields
from ..evaluation.arguments import CheckpointArguments, check_one_process
from ..settings_hierbd3lm import SETTINGS, GenerationSettings

STDIN = "-"
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
