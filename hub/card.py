"""Model card: the README.md of a checkpoint, written from the files of its run."""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..data.arguments import SYNTHETIC
from ..data.names import is_hub_id
from ..data.run_folder import replace
from ..settings_hierbd3lm import SAMPLERS_OF
from .facts import CARD_FILE, Facts, count_weights, dataset_id, dataset_title, license_of, read_facts
from .sections import (
    about,
    data_section,
    evaluation_section,
    likelihood_section,
    limits_section,
    samplers_section,
    training_section,
    usage_section,
)

PICTURE_FILE = "mask.png"
MARK = "<!-- Written by hierbd3lm from the files of the run. A card without this line is kept as it is. -->"
GENERATED = (MARK, "[More Information Needed]", "This model card has been generated automatically")  # by peft, Trainer
TAGS = ("hierbd3lm", "block-diffusion", "text-diffusion", "reasoning", "custom_code")
PLACE = "path/or/id/of/this/model"
QUESTION = "Mia has 3 red and 4 blue apples. She gives 2 apples to Leo. How many apples does Mia have now?"
CITATION = """\
```bibtex
@inproceedings{arriola2025block,
  title     = {Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models},
  author    = {Marianne Arriola and Aaron Gokaslan and Justin T. Chiu and Zhihan Yang and Zhixuan Qi and Jiaqi Han
               and Subham Sekhar Sahoo and Volodymyr Kuleshov},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}

@software{hierbd3lm,
  title   = {hierbd3lm: hierarchical block diffusion language models for Hugging Face Transformers},
  author  = {{The hierbd3lm developers}},
  version = {VERSION}
}
```"""
METRICS = {  # key of a summary -> type and name of the metric
    "exact_match_numeric": ("exact_match", "Exact match"),
    "num_forward_passes_mean": ("num_forward_passes", "Forward passes per answer (NFE)"),
    "tokens_per_forward": ("tokens_per_forward", "Tokens per forward pass"),
}


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    checksum_of_weights: int | None = None,
    local_files_only: bool = True,
    target: str | Path | None = None,
    is_merged: bool = False,
    state: dict[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write the card of a checkpoint and the picture of its mask, unless the folder has a card of its author.

    Args:
        folder: folder of a run or a checkpoint.
        repo_id: id on the Hub, for the title and the usage snippet.
        checksum_of_weights: as in [`read_facts`].
        local_files_only: look for the licence of the base in the cache only.
        target: where to write; `folder` if omitted.
        is_merged: `folder` has an adapter, and `target` the weights that it was merged into.
        state: state of the trainer, in place of the file's.
        metadata: fields of `ModelCardData`, such as `license`, in place of those that the files say.

    Returns:
        the card's path.
    """
    path = Path(folder if target is None else target, CARD_FILE)
    written = Path(folder, CARD_FILE)
    content = written.read_text(encoding="utf-8") if written.is_file() else MARK
    if not any(mark in content for mark in GENERATED):
        replace(path, content.encode())
        return path
    facts = read_facts(folder, checksum_of_weights)
    if is_merged:
        facts = dataclasses.replace(facts, is_adapter=False, num_parameters=count_weights(path.parent))
    if state is not None:
        facts = facts.with_state(state)
    license_fields = license_of(facts.base, local_files_only) or facts.record.get("license") or {}
    has_picture = draw_mask(facts, path.with_name(PICTURE_FILE))
    card = make_card(facts, repo_id, license_fields | metadata, has_picture)
    replace(path, str(card).encode())
    return path


def make_card(
    facts: Facts, repo_id: str | None = None, metadata: dict[str, Any] | None = None, has_picture: bool = False
) -> ModelCard:
    """Return the card that these facts make.

    Args:
        metadata: fields of `ModelCardData` that the facts do not say, such as `license`, or say otherwise.
    """
    name = (repo_id or PLACE).split("/")[-1] if repo_id else f"Hier-BD3-LM ({facts.config['algorithm']})"
    question = example_question(facts)
    fields = _metadata(facts, name, question) | (metadata or {})
    picture = f"\n![The training mask]({PICTURE_FILE})\n" if has_picture else ""
    parts = [
        f"---\n{ModelCardData(**fields).to_yaml()}\n---",
        MARK,
        f"# {name}",
        about(facts),
        picture,
        usage_section(facts, repo_id or PLACE, question),
        data_section(facts),
        training_section(facts),
        likelihood_section(facts),
        evaluation_section(facts),
        samplers_section(facts, SAMPLERS_OF),
        limits_section(facts),
        _license_section(facts, fields),
        f"## Citation\n\n{CITATION.replace('VERSION', __version__)}",
    ]
    return ModelCard("\n\n".join(part.strip("\n") for part in parts if part) + "\n")


def example_question(facts: Facts) -> str:
    """Return a question in the words of the training data: that of a synthetic problem, or one for any model."""
    if facts.config["question_len"] == 0:
        return ""
    if facts.data.get("dataset") != SYNTHETIC:
        return QUESTION
    from ..data.synthetic.config import SyntheticConfig
    from ..data.synthetic.problems import generate_problems

    return next(generate_problems("test", 1, SyntheticConfig(**facts.data.get("synthetic") or {})))["question"]


def eval_results(facts: Facts) -> list[EvalResult]:
    """Return the evaluations and likelihoods as the Hub's model-index takes them."""
    results = []
    for summary in facts.evaluations:
        for key, (kind, title) in METRICS.items():
            value = summary.get(key)
            if value is not None:
                value = round(100 * value, 2) if kind == "exact_match" else round(value, 3)
                results.append(_result(summary, kind, title, value, {"sampler": summary["settings"]["sampler"]}))
    for likelihood in facts.likelihoods:
        for prefix in ("", "plan_", "execution_"):
            if f"{prefix}ppl" in likelihood and (prefix or "plan_ppl" not in likelihood):
                title = f"Perplexity per token{f' of the {prefix[:-1]}' if prefix else ''}"
                results.append(_result(likelihood, "perplexity", title, round(likelihood[f"{prefix}ppl"], 4), None))
    return results


def draw_mask(facts: Facts, path: Path) -> bool:
    """Draw the hierarchical mask of short segments; False where a model has another mask, or without matplotlib."""
    config = facts.config
    if config["algorithm"] != "hier" or not config["hierarchical_mask"] or config["joint"] or not config["plan_len"]:
        return False
    if config["question_attention"] != "bidirectional":
        return False
    from ..evaluation.mask_picture import draw_image, picture_mask

    try:
        draw_image(picture_mask(16, 16, 32, 4), path)
    except ImportError:
        return False
    return True


def _metadata(facts: Facts, name: str, question: str) -> dict[str, Any]:
    dataset = dataset_id(facts.data["dataset"]) if facts.data else None
    fields = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, facts.config["algorithm"]],
        "base_model": facts.base if is_hub_id(facts.base) else None,
        "datasets": [dataset] if dataset else None,
        "widget": [{"text": question}] if question else None,
    }
    if results := eval_results(facts):
        fields |= {"eval_results": results, "model_name": name}
    return {key: value for key, value in fields.items() if value is not None}


def _result(result: dict[str, Any], kind: str, title: str, value: float, arguments: dict | None) -> EvalResult:
    dataset = result.get("dataset") or "unknown"
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=dataset_id(dataset) or (SYNTHETIC if dataset == SYNTHETIC else "own-data"),
        dataset_name=dataset_title(dataset),
        dataset_config=result.get("dataset_name"),
        dataset_split=result.get("split"),
        metric_type=kind,
        metric_name=title,
        metric_value=value,
        metric_args=arguments,
    )


def _license_section(facts: Facts, fields: dict[str, Any]) -> str:
    if "license" in fields:
        of_base = f", inherited from {facts.base}" if facts.base else ""
        text = f"Weights: `{fields['license']}`{of_base}."
    elif facts.base:
        text = f"The weights come from {facts.base}: its licence applies to them."
    else:
        text = "The author has not stated a licence for the weights."
    return f"## License\n\n{text} The code in this repository is under Apache-2.0."
