"""Names that a published file may hold: ids of the Hub, never a path of this machine."""

import os
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def is_hub_id(name: str | None) -> bool:
    """Return True for `owner/name`, unless it is a path that exists here."""
    return bool(name) and HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str | None) -> str:
    """Return an id of the Hub, or a bare word, as it is, and of a path its last part."""
    return name if not name or is_hub_id(name) else Path(name).name


def without_local_paths(value: Any) -> Any:
    """Return the content of a JSON file with the [`public_name`] of every model or tokenizer that it names."""
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: public_name(item) if key in NAME_KEYS and isinstance(item, str) else without_local_paths(item)
        for key, item in value.items()
    }
