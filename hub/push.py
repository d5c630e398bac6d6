"""The command line of a push: `hierbd3lm push DIR REPO`, for a checkpoint, an adapter or a dataset of plans."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


def parse_arguments(argv: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """Parse `DIR REPO [--private] [--revision BRANCH]`."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m hierbd3lm.hub.push",
        description="Push a checkpoint, an adapter (merged into its base) or a dataset of `hierbd3lm plans` to the "
        "Hub, with a card that is written from its files. Log in with `hf auth login` or set HF_TOKEN.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a run, a checkpoint, or written plans")
    parser.add_argument("repo_id", metavar="REPO", help="id on the Hub, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Push a folder and print the address of the commit."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv, prog)
    print(push(options.folder, options.repo_id, options.private or None, options.revision))


def push(folder: str | Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Push a checkpoint, an adapter or a dataset of plans; return the address of the commit.

    Raises:
        ValueError: if the folder is none of these, or what it holds could not be used by others.
    """
    from ..data.plans.hub import PLANS_FILE, push_plans

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, but there is no {folder}")
    if (folder / PLANS_FILE).is_file():
        return push_plans(folder, repo_id, private, revision)
    return push_model(folder, repo_id, private, revision)


def push_model(folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Load a checkpoint, which checks it, and push its files with its card; an adapter is merged into its base."""
    from ..data.upload import commit_files
    from ..evaluation.checkpoints import checksum_of_weights, load_model
    from .card import PICTURE_FILE, write_card
    from .facts import CARD_FILE
    from .files import REPLACED, model_files

    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter:
        model_files(folder)  # raises
    model, tokenizer = load_model(str(folder), "cpu")
    checksum = checksum_of_weights(model)
    with TemporaryDirectory() as staging:
        if is_adapter:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        del model
        write_card(folder, repo_id, checksum, local_files_only=False, target=staging, is_merged=is_adapter)
        files = model_files(Path(staging) if is_adapter else folder)
        files |= {path.name: path for path in Path(staging).iterdir() if path.name in (CARD_FILE, PICTURE_FILE)}
        message = f"Upload {folder.absolute().name} with hierbd3lm"
        return commit_files(files, repo_id, message, "model", private, None, revision, REPLACED).commit_url


if __name__ == "__main__":
    main()
