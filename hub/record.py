"""The record of a training run: its base model and its recipe, saved beside the weights for the model card."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.names import public_name
from ..data.run_folder import write_json
from ..training.settings import AdapterArguments, ObjectiveArguments
from .facts import RECORD_FILE, license_in

RECIPE = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
RECIPE += ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm")
RECIPE += ("bf16", "fp16", "seed", "data_seed")
OBJECTIVE = tuple(item.name for item in fields(ObjectiveArguments) if not item.name.startswith(("eval_", "logging_")))


def make_record(
    model_args: AdapterArguments, args: TrainingArguments, further_settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the record of a run.

    Args:
        model_args: has `init_from`, too, and perhaps `dtype`.
        further_settings: of a method other than likelihood training.

    Returns:
        `init_from`: name of the checkpoint that the run starts from, None if there is none; `license`: that of a base
        in a folder, as its card states it; `settings`: those of optimization, objective and adapter.
    """
    settings = {name: _as_json(getattr(args, name)) for name in (*RECIPE, *OBJECTIVE) if hasattr(args, name)}
    if model_args.use_peft:
        settings |= {item.name: getattr(model_args, item.name) for item in fields(AdapterArguments)}
    base = model_args.init_from
    return {
        "init_from": public_name(base),
        "license": license_in(Path(base)) if base else None,
        "dtype": getattr(model_args, "dtype", "float32"),
        "settings": settings | (further_settings or {}),
    }


def _as_json(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration


class SaveRecord(TrainerCallback):
    """Save the record of a run in its folder and with each checkpoint."""

    def __init__(
        self, model_args: AdapterArguments, args: TrainingArguments, further_settings: dict[str, Any] | None = None
    ):
        self.record = make_record(model_args, args, further_settings)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._save(args, state, "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._save(args, state, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _save(self, args: TrainingArguments, state: TrainerState, folder: str) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir, folder, RECORD_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.record)
