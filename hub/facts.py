"""What the files of a run or a checkpoint say: the facts of its model card."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import EntryNotFoundError
from transformers.utils import cached_file, logging

from ..data.arguments import FILE_NAME as DATA_FILE
from ..data.arguments import GSM8K_IDS, SYNTHETIC
from ..data.names import is_hub_id, public_name

RECORD_FILE, CARD_FILE = "training_config.json", "README.md"
REPORT_FILE, STATE_FILE = "data_report.json", "trainer_state.json"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Facts:
    """Contents of the files of a model; what a file is missing for is empty.

    Args:
        config, generation: config.json and generation_config.json.
        record: see [`~hub.record.make_record`].
        data, counts: the arguments of the training data, and per split the numbers of examples kept and dropped.
        state: trainer_state.json.
        likelihoods: results of `hierbd3lm ppl`, and the last evaluation of the training run as the first of them.
        evaluations: summaries of `hierbd3lm eval`.
        num_parameters: number of weights; of an adapter, those that were trained.
        is_adapter: True for a LoRA adapter.
    """

    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    likelihoods: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    num_parameters: int = 0
    is_adapter: bool = False

    @property
    def base(self) -> str | None:
        """Name of the checkpoint that the backbone comes from; None for a backbone from scratch."""
        first = self.config["backbone_config"].get("_name_or_path")
        return public_name(first or self.record.get("init_from")) or None

    def with_state(self, state: dict[str, Any]) -> "Facts":
        """Return these facts with the state of a trainer, and its last evaluation as the first likelihood."""
        return replace(self, state=state, likelihoods=_likelihood_of_training(state, self.data) + self.likelihoods)


def read_facts(folder: str | Path, checksum_of_weights: int | None = None) -> Facts:
    """Read the facts of a run or of one of its checkpoints; of a checkpoint, some are in the folder above.

    Args:
        checksum_of_weights: sum over the model; evaluations and likelihoods of other weights are left out. If None,
            all of them are.
    """
    folder = Path(folder)
    is_checkpoint = folder.absolute().name.startswith("checkpoint-")
    folders = [folder, folder.absolute().parent] if is_checkpoint else [folder]

    def read(name: str) -> dict[str, Any]:
        return next((_read_json(path / name) for path in folders if (path / name).is_file()), {})

    measured = _results(folder, checksum_of_weights)
    facts = Facts(
        config=_read_json(folder / "config.json"),
        generation=read("generation_config.json"),
        record=read(RECORD_FILE),
        data=read(DATA_FILE),
        counts=read(REPORT_FILE),
        likelihoods=[result for result in measured if "nll" in result],
        evaluations=[result for result in measured if "exact_match_numeric" in result],
        num_parameters=count_weights(folder),
        is_adapter=(folder / "adapter_config.json").is_file(),
    )
    return facts.with_state(_read_json(folder / STATE_FILE)) if (folder / STATE_FILE).is_file() else facts


def dataset_id(dataset: str) -> str | None:
    """Return the id on the Hub of a dataset that `--dataset` names; None for a file, a folder or `synthetic`."""
    if dataset in GSM8K_IDS:
        return GSM8K_IDS[0]
    return dataset if is_hub_id(dataset) else None


def dataset_title(dataset: str) -> str:
    """Return the name of a dataset in a sentence, without the path of a file."""
    if dataset == SYNTHETIC:
        return "synthetic problems of hierbd3lm"
    return dataset_id(dataset) or f"own data ({public_name(dataset)})"


def license_of(base: str | None, local_files_only: bool) -> dict[str, Any]:
    """Return the fields `license`, `license_name` and `license_link` of the card of a base on the Hub.

    Args:
        local_files_only: read the cache only.
    """
    if not is_hub_id(base):
        return {}
    missing_is_none = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    missing_is_none |= {"_raise_exceptions_for_gated_repo": False}
    try:
        path = cached_file(base, CARD_FILE, local_files_only=local_files_only, **missing_is_none)
    except (OSError, EntryNotFoundError) as error:
        logger.warning(f"The licence of {base} could not be read: {error}")
        return {}
    return {} if path is None else _license_fields(Path(path))


def license_in(folder: Path) -> dict[str, Any] | None:
    """Return the licence that the card in a folder states, as [`license_of`] does; None for a folder without one."""
    card = folder / CARD_FILE
    return (_license_fields(card) or None) if card.is_file() else None


def _license_fields(card: Path) -> dict[str, Any]:
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    fields = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ValueError(f"{path} must be JSON, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but got {type(content).__name__}")
    return content


def _likelihood_of_training(state: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the last evaluation of a training run, if it is one of the last step."""
    entries = [entry for entry in state.get("log_history", []) if "eval_nll" in entry]
    if not entries or entries[-1]["step"] != state["global_step"]:
        return []
    metrics = {name.removeprefix("eval_"): value for name, value in entries[-1].items() if name.startswith("eval_")}
    return [metrics | {"dataset": data.get("dataset"), "split": "validation"}]


def _results(folder: Path, checksum: int | None) -> list[dict[str, Any]]:
    """Return the results of evaluation commands in a folder, and in the folders inside it, of these weights."""
    paths = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/summary.json"))]
    found = {path: _read_json(path) for path in paths if path.stem.startswith(("likelihood", "summary"))}
    results = []
    for path, result in found.items():
        if checksum is not None and result.get("checksum_of_weights") == checksum:
            results.append(result)
        elif checksum is not None:
            logger.warning(f"{path} is not of these weights, in this precision, and is left out of the model card")
    return results


def count_weights(folder: Path) -> int:
    """Return the number of weights in the files of a folder."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total
