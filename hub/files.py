"""The files of a checkpoint that a repository of the Hub holds."""

import fnmatch
import json
from pathlib import Path

from ..data.arguments import FILE_NAME as DATA_FILE
from ..data.arguments import SYNTHETIC
from ..data.names import without_local_paths
from .card import PICTURE_FILE
from .facts import CARD_FILE, RECORD_FILE, dataset_id

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
WEIGHTS += ("adapter_model.safetensors",)
CODE = ("*_hierbd3lm.py",)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.*")
TOKENIZER += ("added_tokens.json", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json")
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", RECORD_FILE)
REPLACED = (*WEIGHTS, *CODE)  # what a later model may have under other names
PICKLED_ARGUMENTS = "training_args.bin"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
PACKAGE = Path(__file__).parents[1]


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """Return what of a folder makes its model: weights, code, tokenizer, settings and card, and no local path.

    The arguments of the training data are included if that data is public.

    Returns:
        path in the repository -> file or content.

    Raises:
        ValueError: if something is missing without which the model cannot be loaded, or if the weights are a pickle.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = [name for name in names if _matches(name, (*WEIGHTS, *CODE, *TOKENIZER, *SETTINGS))]
    chosen += [name for name in names if name in (CARD_FILE, PICTURE_FILE)]
    for what, patterns in (("config.json", ("config.json",)), ("tokenizer", TOKENIZER)):
        if not any(_matches(name, patterns) for name in chosen):
            raise ValueError(
                f"`folder` must hold a checkpoint of hierbd3lm with its tokenizer, but {folder} has no {what}"
            )
    if not any(_matches(name, WEIGHTS) for name in chosen):
        pickles = [name for name in names if _matches(name, PICKLES)]
        also = f": {pickles[0]} is a pickle, which is not published; load it and `save_pretrained`" if pickles else ""
        raise ValueError(f"`folder` must hold weights in safetensors files, but {folder} has none{also}")
    files: dict[str, Path | bytes] = {name: folder / name for name in chosen}
    if "adapter_config.json" not in files and not any(_matches(name, CODE) for name in chosen):
        files |= {path.name: path for path in sorted(PACKAGE.glob(CODE[0]))}
    for name in (*SETTINGS, "tokenizer_config.json"):
        if name in files:
            files[name] = clean_json(folder / name)
    data = folder / DATA_FILE
    if data.is_file() and is_public(json.loads(data.read_text(encoding="utf-8"))):
        files[DATA_FILE] = data
    return files


def clean_json(path: Path) -> bytes:
    """Return the content of a JSON file without local paths."""
    content = without_local_paths(json.loads(path.read_text(encoding="utf-8")))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def is_public(data: dict[str, object]) -> bool:
    """Return True for arguments of data that other people can load."""
    dataset = str(data.get("dataset"))
    return (dataset == SYNTHETIC or dataset_id(dataset) is not None) and data.get("parse_example") is None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
