"""Loading of a checkpoint and its examples, and the description of an evaluation run."""

from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import __version__
from ..backbones_hierbd3lm import special_token_ids
from ..configuration_hierbd3lm import SPECIAL_TOKENS
from ..data import run_folder
from ..data.arguments import SYNTHETIC, DataArguments, find_saved_arguments
from ..data.loading import is_one_split
from ..data.splits import load_split
from ..data.text.sets import TEXT_SETS
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..training.lora import is_adapter, is_own_checkpoint, load_adapter, load_tokenizer
from .arguments import NUM_SYNTHETIC, CheckpointArguments

logger = logging.get_logger(__name__)


def load_model(
    path: str, device: str, dtype: str | None = None, attn_implementation: str | None = None
) -> tuple[HierBD3LMForBlockDiffusion, PreTrainedTokenizerBase]:
    """Load a checkpoint, or an adapter merged into its base, onto the device, with its tokenizer.

    `dtype` is the precision of the weights, such as `bfloat16`; as saved if omitted. `attn_implementation` is that of
    transformers' `from_pretrained`.

    Raises:
        ValueError: if the configuration at `path` is missing, or that of another model, such as an autoregressive
            one; if weights are missing, damaged, NaN or infinite; and if the tokenizer is that of another model.
    """
    kwargs = {"dtype": dtype, "attn_implementation": attn_implementation}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if is_adapter(path):
        model, tokenizer = load_adapter(path, device, **kwargs)
    else:
        model, tokenizer = _load_own(path, **kwargs).to(device).eval(), load_tokenizer(path)
    check_loaded(model, tokenizer, path)
    return model, tokenizer


def check_loaded(model: HierBD3LMForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise a ValueError for weights that are NaN or infinite, and for a tokenizer of another model."""
    wrong = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if wrong:
        raise ValueError(f"`model` weights must be finite, but {len(wrong)} of {path} are not, such as {wrong[0]}")
    ids = special_token_ids(tokenizer)  # raises
    for role in SPECIAL_TOKENS:
        expected, got = getattr(model.config, f"{role}_token_id"), ids[f"{role}_token_id"]
        if got != expected:
            token = SPECIAL_TOKENS[role]
            raise ValueError(f"`tokenizer` of {path} must have the id {expected} for {token}, but got {got}")


def _load_own(path: str, **kwargs: Any) -> HierBD3LMForBlockDiffusion:
    """Load a checkpoint of this model, with all of its weights."""
    if not is_own_checkpoint(path):
        found = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        got = "without config.json" if found is None else f"of type {found}"
        raise ValueError(
            f"`model` must be a checkpoint of hierbd3lm, or an adapter that it saved, but got {path!r} {got}: "
            f"`hierbd3lm train --init_from` trains an autoregressive checkpoint as one"
        )
    try:
        model, info = HierBD3LMForBlockDiffusion.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"`model` weights must be whole, but a file of {path} is damaged: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"`model` weights must be whole, but {path} lacks {len(missing)}, such as {missing[0]}")
    return model


def load_examples(args: CheckpointArguments, text_column: str | None = None) -> tuple[DataArguments, Dataset]:
    """Load the examples; returns the data arguments (see [`find_data`]) and the examples.

    Raises:
        ValueError: if the model was trained on a file that does not exist here.
    """
    data_args = find_data(args, text_column)
    limit = NUM_SYNTHETIC if args.limit is None and data_args.dataset == SYNTHETIC else args.limit
    try:
        return data_args, load_split(data_args, args.split, limit)
    except FileNotFoundError as error:
        if args.dataset is not None:
            raise
        raise ValueError(
            f"`dataset` must be given for {args.model}, which was trained on {data_args.dataset}: that is not here"
        ) from error


def find_data(args: CheckpointArguments, text_column: str | None = None) -> DataArguments:
    """Return the data arguments of training, or those of another dataset if one is given.

    Another dataset is plain text, in `text_column` or the column of training, if the training data is; `train` is its
    whole training split. Streaming is switched off.

    Raises:
        ValueError: if no dataset is given and the checkpoint does not say what it was trained on, and for the test
            split of a file or a single saved dataset that it was trained on: it is one split.
    """
    given = {name: getattr(args, name) for name in ("dataset_name", "parse_example")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.dataset in TEXT_SETS:
        return DataArguments(**TEXT_SETS[args.dataset] | given)
    if args.dataset is None or find_saved_arguments(args.model):
        trained_on = replace(DataArguments.load(args.model), streaming=False)
    else:
        trained_on = DataArguments()
    if args.dataset not in (None, trained_on.dataset):
        if args.split == "train":
            given["num_validation_examples"] = 0  # nothing is held out
        text_column = text_column or trained_on.text_column
        return DataArguments(dataset=args.dataset, text_column=text_column, wrap=trained_on.wrap, **given)
    trained_on = replace(trained_on, **given)
    if args.split == "test" and is_one_split(trained_on.dataset):
        raise ValueError(
            f"`split` must be train or validation for {trained_on.dataset}, which {args.model} was trained on, but "
            f"got 'test': give `--dataset` for other examples"
        )
    return trained_on


def describe_model(model: HierBD3LMForBlockDiffusion) -> dict[str, Any]:
    """Return what a model is, and the versions that its results were computed with."""
    return {
        "algorithm": model.config.algorithm,
        "checksum_of_weights": checksum_of_weights(model),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of hierbd3lm, torch and transformers."""
    return {
        "hierbd3lm": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def checksum_of_weights(model: torch.nn.Module) -> int:
    """Return the sum of all bytes of the weights, which tells apart checkpoints saved to the same folder."""
    tensors = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values()]
    return sum(int(tensor.sum(dtype=torch.int64)) for tensor in tensors)


def describe_run(
    args: CheckpointArguments, data_args: DataArguments, dataset: Dataset, model: HierBD3LMForBlockDiffusion
) -> dict[str, Any]:
    """Describe a run: everything that its results depend on, apart from the command's own settings."""
    return {
        "data": asdict(data_args),
        "split": args.split,
        "num_examples": len(dataset),
        "hash_of_data": hash_of_data(dataset),
        "checksum_of_weights": checksum_of_weights(model),
        "batch_size": args.batch_size,
        "device": str(model.device),
    }


def hash_of_data(dataset: Dataset) -> str:
    """Return a hash of the dataset's contents, which tells apart files saved to the same path."""
    return run_folder.hash_of(dataset.to_dict())
