"""Dataset card and upload of written plans."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..names import public_name
from ..run_folder import replace
from ..upload import commit_files
from .filters import FILTERS, MAX_PLAN_CHARS, RUN_LENGTH, score

PLANS_FILE, CARD_FILE = "plans.jsonl", "README.md"
SHARED_FILES = (PLANS_FILE, CARD_FILE, "manifest.json", "summary.json")

CARD = """\
---
{metadata}
---

# Plans for {dataset}

A plan for {num_plans} of {num_problems} solved problems (`{dataset}`, split `{split}`), one plan step for each step of
the solution. {num_plans_by_model} plans were written by `{model}` (seed {seed}, temperature {temperature},
top-p {top_p}), {num_plans_by_rule} by rule; {num_without_plan} problems have no plan. Made with hierbd3lm {version}.

```python
from hierbd3lm import load_reasoning_dataset

dataset = load_reasoning_dataset("path/or/id/of/this/dataset")
```

| column | content |
|---|---|
| `question`, `plan`, `execution` | the segments; the execution ends with `#### <answer>` |
| `answer` | the final answer |
| `plan_steps`, `execution_steps` | the same as lists; the k-th execution step carries out the k-th plan step |
| `plan_source`, `score` | `model` or `rule`; the score by which the plan was chosen |
| `index` | the row of the problem in its dataset |

## Selection of the plans

{num_samples} plans per problem were requested. The model wrote {num_replies} plans; {num_refused} requests were
refused by the server. {num_accepted} plans passed the filters, and the one with the best score was kept for each
problem. Each rejected plan is counted once:

| filter | rejects | plans |
|---|---|---|
{filters}

Here `MAX_PLAN_CHARS` is {max_plan_chars}, `RUN_LENGTH` is {run_length}, and `CONSTANTS` are numbers such as the days
of a week and the minutes of an hour.

The score: {score}
"""


def write_card(folder: Path, manifest: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write the card of a dataset from the manifest and the summary of `write_plans`."""
    manifest = public_manifest(manifest)
    metadata = DatasetCardData(
        pretty_name=f"Plans for {manifest['dataset']}",
        tags=["math", "reasoning", "plans", "hierbd3lm"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": PLANS_FILE}]}],
    )
    filters = [
        f"| `{name}` | {' '.join(rejects.__doc__.split())} | {summary['rejected_by'][name]} |"
        for name, rejects in FILTERS.items()
    ]
    explanation = " ".join(score.__doc__.split())
    content = CARD.format(
        **manifest | summary,
        metadata=metadata.to_yaml(),
        filters="\n".join(filters),
        max_plan_chars=MAX_PLAN_CHARS,
        run_length=RUN_LENGTH,
        score=explanation,
    )
    replace(folder / CARD_FILE, str(DatasetCard(content)).encode())


def push_plans(folder: Path, repo_id: str, private: bool | None, revision: str | None = None) -> str:
    """Upload the dataset in a folder, with its card, manifest and summary; return the address of the commit.

    Raises:
        ValueError: if one of these files is missing.
    """
    if missing := [name for name in SHARED_FILES if not (folder / name).is_file()]:
        raise ValueError(f"`folder` must hold finished plans, but {folder} has no {', '.join(missing)}")
    files: dict[str, Path | bytes] = {name: folder / name for name in SHARED_FILES}
    manifest = public_manifest(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    files["manifest.json"] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    return commit_files(files, repo_id, "Upload plans", "dataset", private, revision=revision).commit_url


def public_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without the paths of files on this machine."""
    return manifest | {name: public_name(manifest[name]) for name in ("dataset", "model")}
