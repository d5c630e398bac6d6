"""Hierarchical block diffusion language models (Hier-BD3-LM) for Hugging Face Transformers."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
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


class _RegisterWithAutoClasses:
    """Import the module that registers a class of this package as soon as transformers' Auto classes are there.

    To import it at once would cost seconds, in every `--help` too, and nothing else tells of a later import.
    """

    modules = {  # noqa: RUF012  (of transformers -> of this package, which registers its class at its end)
        "transformers.models.auto.configuration_auto": "configuration_hierbd3lm",
        "transformers.models.auto.modeling_auto": "modeling_hierbd3lm",
    }

    pending: set[str] = set()  # noqa: RUF012  (of `modules`; their classes are registered at the next import)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.endswith("_hierbd3lm"):  # a registration may import such a module, which is imported once only
            late, cls.pending = cls.pending, set()
            for other in late:
                cls.register(other)
        if name not in cls.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            cls.register(name)

        spec.loader.exec_module = execute_and_register  # of the loader of this module alone
        return spec

    @classmethod
    def register(cls, name: str) -> None:
        own = [module for key, module in list(sys.modules.items()) if key.startswith(f"{__name__}.")]
        # A module of the package that is being imported may be one that the import below needs.
        if any(getattr(module.__spec__, "_initializing", False) for module in own):
            cls.pending.add(name)
        else:
            importlib.import_module(f".{cls.modules[name]}", __name__)


for _name in _RegisterWithAutoClasses.modules:
    if _name in sys.modules:
        _RegisterWithAutoClasses.register(_name)
sys.meta_path.insert(0, _RegisterWithAutoClasses)
