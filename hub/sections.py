"""Sections of a model card in Markdown, each a function of the facts."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..data.names import is_hub_id
from .facts import Facts, dataset_title

ABOUT = {
    "hier": "It denoises a plan from the question, block by block, then the execution from question and plan.",
    "bd3lm": "It denoises the answer, plan and execution, as one run of blocks (BD3-LM).",
    "mdlm": "It denoises the answer, plan and execution, as one block (MDLM).",
    "sedd": "It denoises the answer, plan and execution, as one block (SEDD, absorbing).",
    "ar": "It is the autoregressive baseline of hierbd3lm: it writes plan and execution token by token.",
}
COUNTS = {
    "num_examples": "examples read",
    "num_kept": "kept",
    "num_dropped": "dropped: too long",
    "num_with_special_tokens": "dropped: text spells out a special token",
    "num_near_test": "dropped: near-duplicates of test problems",
    "num_unknown_tokens": "unknown tokens",
    "num_lost_answers": "answers that the tokenizer loses (first 200)",
}


def about(facts: Facts) -> str:
    """Return what the model is."""
    config = facts.config
    backbone = config["backbone_config"]
    layers = backbone.get("num_hidden_layers") or backbone.get("n_layer")
    width = backbone.get("hidden_size") or backbone.get("n_embd")
    if not facts.base:
        origin = "It was trained from scratch."
    elif is_hub_id(facts.base):
        origin = f"It was fine-tuned from [{facts.base}](https://huggingface.co/{facts.base})."
    else:
        origin = f"It was fine-tuned from the checkpoint `{facts.base}`."
    what = "A LoRA adapter of a" if facts.is_adapter else "A"
    lines = [
        f"{what} [block diffusion](https://arxiv.org/abs/2503.09573) language model over question, plan and "
        f"execution, made with hierbd3lm. {ABOUT[config['algorithm']]} {origin}",
        "",
        _table(
            ("", ""),
            [
                ("backbone", f"`{backbone['model_type']}`, {layers} layers of width {width}"),
                ("weights" if not facts.is_adapter else "trained weights", f"{facts.num_parameters:,}"),
                ("longest question, plan, execution", _lengths(config)),
                ("block size of plan, execution", f"{config['plan_block_size']}, {config['execution_block_size']}"),
                ("prediction", f"`{config['prediction']}`"),
            ],
        ),
    ]
    return "\n".join(lines)


def usage_section(facts: Facts, repo_id: str, question: str) -> str:
    """Return a snippet that loads the model and answers a question."""
    if facts.is_adapter:
        lines = [
            "from hierbd3lm.training.lora import load_adapter",
            "",
            f'model, tokenizer = load_adapter("{repo_id}", "cpu")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)',
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)',
        ]
    lines += ["", f"question = {question!r}" if '"' in question else f'question = "{question}"']
    if facts.config["chat_template"]:
        lines += [
            'messages = [{"role": "user", "content": question}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer(question, return_tensors="pt")')
    lines.append("output = model.generate(**inputs)")
    if facts.config["plan_len"]:
        lines.append("print(tokenizer.decode(output.plan[0], skip_special_tokens=True))")
    lines.append("print(tokenizer.decode(output.execution[0], skip_special_tokens=True))")
    code = "\n".join(lines)
    remark = "" if facts.is_adapter else " The code of the model comes with it: torch and transformers are enough."
    return f"## Use\n\n```python\n{code}\n```\n\nNeeds transformers >= 5.21 and torch >= 2.11.{remark}"


def data_section(facts: Facts) -> str:
    """Return the training data, with the counts of what was dropped."""
    if not facts.data:
        return "## Data\n\nThe files of this checkpoint do not say what it was trained on."
    name = facts.data.get("dataset_name")
    revision = facts.data.get("dataset_revision")
    text = f"Trained on {dataset_title(facts.data['dataset'])}"
    text += f", configuration `{name}`" if name else ""
    text += f", revision `{revision}`" if revision else ""
    if not facts.counts:
        return f"## Data\n\n{text}."
    splits = list(facts.counts)
    flat = {split: _flatten(report) for split, report in facts.counts.items()}
    keys = dict.fromkeys(key for report in flat.values() for key in report)
    rows = [(_label(key), *(_number(flat[split].get(key)) for split in splits)) for key in keys]
    return f"## Data\n\n{text}:\n\n{_table(('', *splits), rows)}"


def training_section(facts: Facts) -> str:
    """Return the number of steps and the recipe."""
    state, settings = facts.state, facts.record.get("settings", {})
    if not state and not settings:
        return ""
    rows = []
    if state:
        rows = [("training steps", f"{state['global_step']:,} of {state['max_steps']:,}")]
        rows += [("epochs", f"{state['epoch']:.2f}")] if state.get("epoch") is not None else []
    rows += [(f"`{name}`", f"{value}") for name, value in settings.items() if value is not None]
    if "dtype" in facts.record:
        rows.append(("precision of the weights", facts.record["dtype"]))
    return f"## Training\n\n{_table(('', ''), rows)}"


def likelihood_section(facts: Facts) -> str:
    """Return NLL and perplexity of each segment."""
    rows = []
    for result in facts.likelihoods:
        where = (dataset_title(result.get("dataset") or "unknown"), result["split"])
        for segment, prefix in (("plan", "plan_"), ("execution", "execution_"), ("both", "")):
            if f"{prefix}nll" in result:
                nll, bpd, ppl = (result[f"{prefix}{name}"] for name in ("nll", "bpd", "ppl"))
                numbers = f"{nll:.4f}", f"{bpd:.4f}", f"{ppl:.3f}"
                rows.append((*where, segment, f"{result[f'{prefix}num_tokens']:,}", *numbers))
    if not rows:
        return ""
    is_exact = facts.config["algorithm"] == "ar" or facts.config["plan_block_size"] == 1
    kind = "They are exact." if is_exact else "They are upper bounds."
    head = ("data", "split", "segment", "tokens", "nats per token", "bits per token", "perplexity")
    return (
        "## Likelihood\n\nNegative log-likelihood per token given the question, over content and one `<|end|>` per "
        f"segment. {kind}\n\n{_table(head, rows)}"
    )


def evaluation_section(facts: Facts) -> str:
    """Return exact match with its 95 % interval, and NFE."""
    if not facts.evaluations:
        return ""
    rows = []
    for summary in facts.evaluations:
        low, high = summary["exact_match_numeric_interval"]
        match = f"{100 * summary['exact_match_numeric']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
        plans = "its own" if summary.get("given_plan") is None else "given"
        where = f"{dataset_title(summary['dataset'])}, {summary['split']}"
        costs = (_number(summary[name], 2) for name in ("num_forward_passes_mean", "tokens_per_forward"))
        rows.append((where, f"{summary['n']:,}", plans, _sampler(summary["settings"]), match, *costs))
    head = (
        "data",
        "problems",
        "plans",
        "sampler",
        "exact match [95 % interval]",
        "NFE per answer",
        "tokens per forward",
    )
    return f"## Evaluation\n\n{_table(head, rows)}"


def samplers_section(facts: Facts, sampler_settings: dict[str, Sequence[str]]) -> str:
    """Return the samplers, with the NFE that was measured."""
    if facts.config["algorithm"] == "ar":
        return "## Samplers\n\nThe model writes one token per forward pass. `temperature` and `top_p` apply."
    measured: dict[str, list[float]] = {}
    for summary in facts.evaluations:
        if summary["num_forward_passes_mean"] is not None:
            measured.setdefault(summary["settings"]["sampler"], []).append(summary["num_forward_passes_mean"])
    rows = []
    for name, what in (
        ("confidence", "every token whose probability exceeds `threshold`"),
        ("entropy", "the tokens of lowest entropy within `entropy_bound`"),
        ("first_hitting", "one token, at random times; exact"),
        ("ancestral", "the tokens of one of `num_steps` time steps per block"),
    ):
        default = " (default)" if facts.generation.get("sampler", "confidence") == name else ""
        nfe = ", ".join(f"{value:.1f}" for value in measured.get(name, [])) or "not measured"
        settings = ", ".join(f"`{key}`" for key, samplers in sampler_settings.items() if name in samplers)
        rows.append((f"`{name}`{default}", what, settings, nfe))
    return f"## Samplers\n\n{_table(('`sampler`', 'a forward pass reveals', 'settings', 'NFE per answer'), rows)}"


def limits_section(facts: Facts) -> str:
    """Return what the model cannot do, and what it was not tested on."""
    tested = sorted({f"{dataset_title(s['dataset'])} ({s['split']})" for s in facts.evaluations})
    lines = [
        f"- Longer inputs than {_lengths(facts.config)} tokens of question, plan and execution are refused or cut.",
        f"- Answers were scored on {' and '.join(tested)} only; nothing else was tested."
        if tested
        else "- No answer of this model has been scored.",
        "- It has not been tested for other tasks or languages, for dialogue of several turns, or for safety, bias "
        "and factual accuracy.",
    ]
    if facts.config["algorithm"] == "hier":
        lines.append("- A plan may look right and be wrong; the execution follows it either way.")
    return "## Limits\n\n" + "\n".join(lines)


def _lengths(config: dict[str, Any]) -> str:
    return f"{config['question_len']}, {config['plan_len']}, {config['execution_len']}"


def _sampler(settings: dict[str, Any]) -> str:
    names = {"confidence": ("threshold",), "entropy": ("entropy_bound",), "ancestral": ("num_steps",)}
    given = [f"{name} {settings[name]}" for name in (*names.get(settings["sampler"], ()), "temperature")]
    return f"`{settings['sampler']}`, {', '.join(given)}"


def _flatten(report: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in report.items():
        flat |= _flatten(value, f"{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _label(key: str) -> str:
    if key.startswith("dropped_by_segment: "):
        return f"of these, the {key.split(': ')[1]} is too long"
    return COUNTS.get(key, key.removeprefix("num_").replace("_", " "))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"|{'|'.join(str(cell) for cell in line)}|" for line in lines)
