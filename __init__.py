"""Hierarchical block diffusion language models (Hier-BD3-LM) for Hugging Face Transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .configuration_hierbd3lm import HierBD3LMConfig
    from .data.collator import HierarchicalDataCollator
    from .data.loading import load_reasoning_dataset, prepare_dataset
    from .masking_hierbd3lm import create_hierarchical_mask
    from .modeling_hierbd3lm import HierBD3LMForBlockDiffusion
    from .settings_hierbd3lm import HierBD3LMGenerationConfig
    from .trainer import HierBD3LMTrainer
    from .training.arguments import HierBD3LMTrainingArguments

# name -> the file that defines it; imported when it is first asked for
_EXPORTS = {
    "HierBD3LMConfig": "configuration_hierbd3lm",
    "HierBD3LMForBlockDiffusion": "modeling_hierbd3lm",
    "HierBD3LMGenerationConfig": "settings_hierbd3lm",
    "HierBD3LMTrainer": "trainer",
    "HierBD3LMTrainingArguments": "training.arguments",
    "HierarchicalDataCollator": "data.collator",
    "create_hierarchical_mask": "masking_hierbd3lm",
    "load_reasoning_dataset": "data.loading",
    "prepare_dataset": "data.loading",
}
__all__ = [
    "HierBD3LMConfig",
    "HierBD3LMForBlockDiffusion",
    "HierBD3LMGenerationConfig",
    "HierBD3LMTrainer",
    "HierBD3LMTrainingArguments",
    "HierarchicalDataCollator",
    "create_hierarchical_mask",
    "load_reasoning_dataset",
    "prepare_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
