"""A checkpoint as a model to train: whole, or frozen under a LoRA adapter, and back from such an adapter."""

import copy
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..backbones_hierbd3lm import check_tied_as_loaded, find_gguf
from ..configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig, config_fields
from ..data.arguments import check_at_least
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from .settings import AdapterArguments

ALL_LINEAR = "all-linear"  # peft's name for every linear layer except the head


class HierBD3LMAdapter(PeftModel):
    """A `PeftModel` that saves the model's configuration with the adapter, and only the trained embedding rows.

    After the vocabulary has grown, peft would save both embedding matrices in full.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **{"save_embedding_layers": False, **kwargs})
        if kwargs.get("is_main_process", True):
            model = self.get_base_model()
            config = copy.deepcopy(model.config)
            config.dtype = model.dtype
            del config.auto_map  # an adapter is loaded with the code of its base, and has none in its folder
            config.to_json_file(Path(save_directory, CONFIG_NAME))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Leave the card to the trainer: that of peft would state the path of a base."""


def add_adapter(model: HierBD3LMForBlockDiffusion, base: str, args: AdapterArguments) -> HierBD3LMAdapter:
    """Freeze a model and add a new LoRA adapter. The embedding rows of the special tokens are trained too.

    Args:
        base: checkpoint that the model was loaded from, as [`load_checkpoint`] takes it; saved with the adapter, a
            folder with its full path.

    Raises:
        ValueError: if a setting is out of its range, or if single embedding rows of the model cannot be trained.
    """
    check_adapter(args)
    rows = sorted({getattr(model.config, f"{role}_token_id") for role in SPECIAL_TOKENS})
    matrices = model.get_input_embeddings(), model.get_output_embeddings()
    for name in args.lora_modules_to_save or ():
        if any(module in matrices for path, module in model.named_modules() if path.endswith(name)):
            raise ValueError(f"`lora_modules_to_save` must not name the embeddings or the head, but got {name!r}")
    targets = args.lora_target_modules
    lora = LoraConfig(
        base_model_name_or_path=os.path.abspath(base) if os.path.exists(base) else base,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=ALL_LINEAR if targets in (None, [ALL_LINEAR]) else targets,
        modules_to_save=args.lora_modules_to_save,
        trainable_token_indices=dict.fromkeys(token_modules(model), rows),
    )
    for name, module in model.named_modules():
        if module in matrices and check_target_module_exists(lora, name):
            raise ValueError(
                f"`lora_target_modules` must not name the embeddings or the head, but got {targets}, which matches "
                f"{name}: the rows of the special tokens are trained in any case"
            )
    return HierBD3LMAdapter(model, lora)


def check_adapter(args: AdapterArguments) -> None:
    """Raise a ValueError if a setting is out of its range."""
    for name in ("lora_r", "lora_alpha"):
        check_at_least(name, getattr(args, name), 1)
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"`lora_dropout` must be in [0, 1), but got {args.lora_dropout}")


def token_modules(model: HierBD3LMForBlockDiffusion) -> list[str]:
    """Return the names of the modules that hold a row per token: the embeddings, and the head if it is not tied.

    Raises:
        ValueError: if the head has a bias, which peft ignores when it trains single rows.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"`use_peft` must be False for a head with a bias, as that of {type(model.backbone).__name__}"
        )
    by_row = [model.get_input_embeddings()] + ([] if model.config.tie_word_embeddings else [head])
    return [name for name, module in model.named_modules() if any(module is matrix for matrix in by_row)]


def load_checkpoint(
    path: str, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], **kwargs: Any
) -> HierBD3LMForBlockDiffusion:
    """Load a model from a checkpoint of this model, from an adapter (merged into its base), or convert an
    autoregressive checkpoint.

    Args:
        path: folder, Hub id or GGUF file.
        tokenizer: tokenizer of the checkpoint. Special tokens that an autoregressive one lacks are added in place.
        fields: fields of [`HierBD3LMConfig`] that override the checkpoint's.
        kwargs: passed to `from_pretrained`, such as `dtype` and `attn_implementation`.
    """
    if is_adapter(path):
        return _load_merged(path, tokenizer, fields, **kwargs)
    if is_own_checkpoint(path):
        return HierBD3LMForBlockDiffusion.from_pretrained(path, **fields, **kwargs)
    return HierBD3LMForBlockDiffusion.from_autoregressive(path, tokenizer, **fields, **kwargs)


def load_adapter(path: str, device: str, **kwargs: Any) -> tuple[HierBD3LMForBlockDiffusion, PreTrainedTokenizerBase]:
    """Load an adapter merged into its base, on a device and in evaluation mode, with its tokenizer.

    `kwargs` are passed to `from_pretrained`, such as `dtype`.
    """
    tokenizer = load_tokenizer(path)
    return load_checkpoint(path, tokenizer, {}, **kwargs).to(device).eval(), tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint of any kind; of an adapter that has none, that of its base."""
    if is_adapter(path) and not has_file(path, "tokenizer_config.json"):
        return load_tokenizer(base_of(path))
    # Without a configuration, AutoTokenizer asks for `trust_remote_code` if the checkpoint carries its own code.
    config = HierBD3LMConfig.from_pretrained(path) if is_own_checkpoint(path) else None
    path, gguf = find_gguf(path)
    return AutoTokenizer.from_pretrained(path, config=config, **gguf)


def is_adapter(path: str) -> bool:
    """Return True if a folder or Hub id holds an adapter."""
    return find_adapter_config_file(find_gguf(path)[0]) is not None


def is_own_checkpoint(path: str) -> bool:
    """Return True if a checkpoint is of this model, False if it is autoregressive."""
    if find_gguf(path)[1] or not has_file(path, CONFIG_NAME):
        return False
    return HierBD3LMConfig.get_config_dict(path)[0].get("model_type") == HierBD3LMConfig.model_type


def has_file(path: str, name: str) -> bool:
    """Return True if a folder or a repository of the Hub has a file."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def base_of(adapter: str) -> str:
    """Return the checkpoint that an adapter was trained on.

    Raises:
        ValueError: if that is a folder that does not exist.
    """
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if base is None or (os.path.isabs(base) and not os.path.exists(base)):
        raise ValueError(
            f"`base_model_name_or_path` in adapter_config.json of {adapter} must be the checkpoint that the adapter "
            f"was trained on, but there is no {base}: set it to where that is now"
        )
    return base


def _load_merged(
    path: str, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], **kwargs: Any
) -> HierBD3LMForBlockDiffusion:
    base = base_of(path)
    if is_own_checkpoint(path):
        config = HierBD3LMConfig.from_pretrained(path, **fields)
        fields = {name: getattr(config, name) for name in config_fields().keys() - {"backbone_config", "block_size"}}
        kwargs = {"dtype": config.dtype} | kwargs
    elif not (is_adapter(base) or is_own_checkpoint(base)):  # made by hand with peft, which saves no configuration
        raise ValueError(
            f"`model` must be an adapter with the configuration of its model, but {path} has no {CONFIG_NAME} and its "
            f"base {base} is autoregressive: save that of the adapted model there with `model.config.save_pretrained`"
        )
    try:
        model = load_checkpoint(base, tokenizer, fields, **kwargs)
    except OSError as error:
        raise OSError(f"{path} is an adapter of {base}, which cannot be loaded: {error}") from error
    adapted = PeftModel.from_pretrained(model, path)
    matrices = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(isinstance(matrix, LoraLayer) for matrix in matrices):
        raise ValueError(
            f"`target_modules` of {path} must not name the embeddings or the head of a base where the two are tied: "
            "merged, both would change"
        )
    merged = adapted.merge_and_unload()
    check_tied_as_loaded(None, merged.backbone)
    return merged.requires_grad_(True)  # adding an adapter has frozen the base
