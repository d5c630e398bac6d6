"""Checks of a checkpoint before a run resumes from it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import CONFIG_NAME

from ..configuration_hierbd3lm import HierBD3LMConfig, config_fields

# fields of a backbone's configuration that do not change what it computes
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "auto_map")
# part of a checkpoint -> patterns of its files; DeepSpeed and FSDP write folders
STATE_FILES = {
    "the optimizer": ("optimizer*", "global_step*"),
    "the learning rate schedule": ("scheduler.pt", "global_step*"),
    "the trainer's state": ("trainer_state.json",),
    "the random generators": ("rng_state*.pth",),
}


def check_complete(checkpoint: str) -> None:
    """Check that a checkpoint is complete.

    Raises:
        ValueError: if it is not a folder, or a part is missing, which training would silently restart.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be the folder of a checkpoint, or `last`, but got {checkpoint}"
        )
    missing = [
        part
        for part, patterns in STATE_FILES.items()
        if not any(next(Path(checkpoint).glob(pattern), None) for pattern in patterns)
    ]
    if missing:
        raise ValueError(
            f"`resume_from_checkpoint` must be a complete checkpoint, but {checkpoint} lacks {', '.join(missing)} "
            f"(`save_only_model` leaves them out): start a new run from its weights with `init_from`"
        )


def check_same_model(
    checkpoint: str, config: HierBD3LMConfig, changing: Collection[str] = ()
) -> HierBD3LMConfig | None:
    """Check that a checkpoint is of the same model, and return its configuration; None without a configuration file.

    Args:
        changing: fields that may differ.

    Raises:
        ValueError: if another field differs: the weights may fit, but would be trained as another model.
    """
    if not Path(checkpoint, CONFIG_NAME).is_file():  # sharded by FSDP
        return None
    saved = HierBD3LMConfig.from_pretrained(checkpoint)
    names = config_fields().keys() - {"block_size", "backbone_config", *changing}
    pairs = {name: (getattr(saved, name), getattr(config, name)) for name in sorted(names)}
    old, new = (_as_stored(each.backbone_config) for each in (saved, config))
    names = {name for name in old.keys() | new.keys() if name not in NOT_OF_THE_MODEL}
    pairs |= {f"backbone_config.{name}": (old.get(name), new.get(name)) for name in sorted(names)}
    different = [f"{name}: {a!r} stored, {b!r} now" for name, (a, b) in pairs.items() if a != b]
    if different:
        raise ValueError(
            f"`resume_from_checkpoint` must be of the same model, but {checkpoint} differs ({'; '.join(different)}): "
            f"give the stored settings, or start a new run from its weights with `init_from`"
        )
    return saved


def _as_stored(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=str))  # tuples become lists


class ExampleOrder(TrainerCallback, ExportableState):
    """Settings that determine the order of the examples. They are saved with the trainer's state and must not change.

    Args:
        total_train_batch_size: number of examples per update.
        num_examples: number of examples per epoch; None for a stream.
        seed: random seed of the sampler.
        strategy: `train_sampling_strategy`.
        packing: batches are grouped by the lengths of a pass.
    """

    def __init__(
        self, total_train_batch_size: int, num_examples: int | None, seed: int, strategy: str, packing: bool = False
    ):
        self.settings = {
            "total_train_batch_size": total_train_batch_size,
            "num_examples": num_examples,
            "seed": seed,
            "strategy": strategy,
            "packing": packing,
        }

    def state(self) -> dict[str, Any]:
        return {"args": self.settings, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare with the checkpoint that training resumes from.

        Raises:
            ValueError: if a setting differs: some examples would be missed and others repeated.
        """
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["args"]
        saved.setdefault("packing", False)  # of checkpoints from before this setting
        different = [
            f"{name}: {saved[name]} stored, {value} now"
            for name, value in self.settings.items()
            if saved[name] != value
        ]
        if different and not args.ignore_data_skip:
            raise ValueError(
                f"the order of the examples must be that of the checkpoint to resume from, but differs "
                f"({'; '.join(different)}). The total batch size is per_device_train_batch_size x "
                f"gradient_accumulation_steps x processes. `ignore_data_skip: true` starts the epoch again"
            )
