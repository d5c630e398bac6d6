"""Hierarchical block diffusion language models (Hier-BD3-LM) for Hugging Face Transformers."""

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> the file that defines it; imported when it is first asked for
_EXPORTS = {
    "HierBD3LMConfig": "configuration_hierbd3lm",
    "HierBD3LMForBlockDiffusion": "modeling_hierbd3lm",
    "HierBD3LMGenerationConfig": "generation_hierbd3lm",
    "HierBD3LMTrainer": "trainer",
    "HierBD3LMTrainingArguments": "training.arguments",
    "HierarchicalDataCollator": "data.collator",
    "create_hierarchical_mask": "masking_hierbd3lm",
    "load_reasoning_dataset": "data.loading",
    "prepare_dataset": "data.loading",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
