"""One atomic commit to a repository of the Hub, tried again where the server or the network fails."""

import fnmatch
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

WAITS = (1.0, 4.0, 16.0)  # seconds before each further try

logger = logging.get_logger(__name__)


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    replaced: Sequence[str] = (),
) -> CommitInfo:
    """Create a repository if there is none, and commit files to it.

    Weights are uploaded before the commit: a reader sees all of the files or none. What a failed try
    has uploaded is not sent again by the next one.

    Args:
        files: path in the repository -> file or content.
        replaced: patterns of the files that this commit replaces: others of these names are deleted from the
            repository, such as the shards of an earlier model.
    """
    for wait in (*WAITS, None):
        try:
            return _commit(HfApi(token=token), files, repo_id, message, repo_type, private, revision, replaced)
        except Exception as error:
            if wait is None or not is_transient(error):
                raise
            logger.warning(f"The push to {repo_id} failed and is tried again in {wait:.0f} s: {error}")
        time.sleep(wait)
    raise AssertionError("unreachable")


def _commit(
    api: HfApi,
    files: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    repo_type: str,
    private: bool | None,
    revision: str | None,
    replaced: Sequence[str],
) -> CommitInfo:
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision) if replaced else []
    stale = [name for name in there if name not in files and any(_matches(name, rule) for rule in replaced)]
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, revision=revision)


def _matches(name: str, pattern: str) -> bool:
    """Return True if a path matches a pattern whose `*` stands for part of one name, not for folders."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)


def is_transient(error: BaseException | None) -> bool:
    """Return True for an error of the server or the network, also as the cause of another error."""
    if error is None:
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    is_network = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)  # of the HTTP client
    return is_network or isinstance(error, ConnectionError) or is_transient(error.__cause__)
