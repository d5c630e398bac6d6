"""Golden cases: what tiny models generate, measure, learn from and are fed, as `values.json` keeps it.

    python tests/golden/record.py            # records the cases that values.json lacks
    python tests/golden/record.py --all      # records all cases anew, but for those of checkpoints

Weights are drawn from fixed seeds, in float64, so that no near-tie falls differently on another processor.
"""

import argparse
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config

from hierbd3lm import (
    HierarchicalDataCollator,
    HierBD3LMConfig,
    HierBD3LMForBlockDiffusion,
    HierBD3LMTrainer,
    HierBD3LMTrainingArguments,
)
from hierbd3lm.evaluation.likelihood import measure_likelihood

FOLDER = Path(__file__).parent
VALUES, CHECKPOINTS = FOLDER / "values.json", FOLDER / "checkpoints"

TOKEN_IDS = {"pad": 0, "end": 1, "plan": 2, "execution": 3, "mask": 4}
FIRST_CONTENT_ID, VOCAB_SIZE = 5, 40
LENGTHS = {"question_len": 16, "plan_len": 32, "execution_len": 32}
NO_PLAN, TEXT = {"plan_len": 0}, {"question_len": 0, "plan_len": 0}

# name -> fields of HierBD3LMConfig
MODELS = {
    "hier": {"block_size": 4},
    "hier_1": {"block_size": 1},
    "hier_16": {"block_size": 16},
    "hier_4_16": {"plan_block_size": 4, "execution_block_size": 16},
    "hier_16_4": {"plan_block_size": 16, "execution_block_size": 4},
    "hier_cosine": {"block_size": 8, "noise": "cosine"},
    "bd3lm": {"algorithm": "bd3lm", "block_size": 4},
    "bd3lm_1": {"algorithm": "bd3lm", "block_size": 1},
    "bd3lm_16": {"algorithm": "bd3lm", "block_size": 16},
    "mdlm": {"algorithm": "mdlm"},
    "sedd": {"algorithm": "sedd"},
    "ar": {"algorithm": "ar"},
    "paired": {"hierarchical_mask": False, "block_size": 4},
    "paired_1": {"hierarchical_mask": False, "block_size": 1},
    "paired_16": {"hierarchical_mask": False, "block_size": 16},
    "paired_16_4": {"hierarchical_mask": False, "plan_block_size": 16, "execution_block_size": 4},
    "joint": {"joint": True},
    "joint_paired": {"joint": True, "hierarchical_mask": False},
    "no_plan": {"block_size": 4, **NO_PLAN},
    "no_plan_16": {"block_size": 16, **NO_PLAN},
    "no_plan_bd3lm": {"algorithm": "bd3lm", "block_size": 4, **NO_PLAN},
    "no_plan_mdlm": {"algorithm": "mdlm", **NO_PLAN},
    "no_plan_ar": {"algorithm": "ar", **NO_PLAN},
    "text": {"block_size": 4, **TEXT},
    "text_bd3lm": {"algorithm": "bd3lm", "block_size": 16, **TEXT},
    "text_mdlm": {"algorithm": "mdlm", **TEXT},
    "text_ar": {"algorithm": "ar", **TEXT},
}
# Of the weights, where it is not 2: with these about half of a model's rows end before their limits.
SEEDS = {
    **{"bd3lm": 21, "bd3lm_1": 21, "bd3lm_16": 14, "mdlm": 8, "sedd": 22, "ar": 8},
    **{"paired_1": 8, "paired_16": 8, "joint_paired": 14, "no_plan": 11, "no_plan_bd3lm": 1, "no_plan_ar": 0},
    **{"text": 14, "text_bd3lm": 18, "text_ar": 4},
}
MAIN_MODELS = ("hier", "bd3lm", "mdlm", "paired", "joint")
SAMPLERS = {
    "first_hitting": {"sampler": "first_hitting"},
    "ancestral": {"sampler": "ancestral", "num_steps": 6},
    "confidence": {"sampler": "confidence", "threshold": 0.35},
    "entropy": {"sampler": "entropy", "entropy_bound": 3.0},
}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
LEFT, UNFILLED = {"left_to_right": True}, {"fill_after_end": False}

# name -> models, settings of `generate`
GENERATIONS = {
    **{f"{name}_greedy": (MAIN_MODELS, settings) for name, settings in SAMPLERS.items()},
    **{f"{name}_sampled": (MODELS, settings | SAMPLED) for name, settings in SAMPLERS.items()},
    "default": (MODELS, {}),
    "confidence_left": ([*MAIN_MODELS, "bd3lm_16", "no_plan_16"], SAMPLERS["confidence"] | LEFT),
    "entropy_left": (MODELS, SAMPLERS["entropy"] | LEFT),
    "entropy_left_sampled": (MAIN_MODELS, SAMPLERS["entropy"] | LEFT | SAMPLED),
    "several_a_step": (MAIN_MODELS, SAMPLERS["confidence"] | SAMPLED | {"tokens_per_step": 3}),
    "unfilled": ([*MAIN_MODELS, "hier_4_16", "text_bd3lm"], SAMPLERS["confidence"] | UNFILLED),
    "unfilled_sampled": (MAIN_MODELS, SAMPLERS["first_hitting"] | SAMPLED | UNFILLED),
    "alone": ([*MAIN_MODELS, "hier_16", "ar", "text"], SAMPLERS["entropy"] | SAMPLED),
    "plan": (["hier", "hier_16_4", "bd3lm", "mdlm", "ar", "joint"], SAMPLERS["entropy"] | {"stage": "plan"}),
    "plan_sampled": (["hier", "bd3lm_16", "sedd"], SAMPLERS["first_hitting"] | SAMPLED | {"stage": "plan"}),
    "execution": (
        ["hier", "hier_4_16", "bd3lm", "bd3lm_16", "mdlm", "ar", "paired", "paired_16_4", "joint", "joint_paired"],
        SAMPLERS["confidence"] | {"stage": "execution"},
    ),
    "execution_sampled": (
        ["hier", "bd3lm", "sedd", "ar", "paired", "joint"],
        SAMPLERS["ancestral"] | SAMPLED | {"stage": "execution"},
    ),
    "short": (
        ["hier", "hier_4_16", "bd3lm", "ar", "paired", "no_plan"],
        SAMPLERS["entropy"] | SAMPLED | {"max_plan_len": 8, "max_execution_len": 16},
    ),
}
# Of `ar`, to which samplers are nothing: one case of each temperature is enough.
CAUSAL = {"default", "first_hitting_sampled", "alone", "plan", "execution", "execution_sampled", "short"}
COMPILED = ("hier/confidence_sampled", "bd3lm/first_hitting_sampled", "paired/entropy_left")

# name -> models, arguments of `measure_likelihood`
LIKELIHOODS = {
    "draws": (MODELS, {}),
    "exact": (["hier", "hier_1", "bd3lm", "bd3lm_1", "paired_1", "no_plan", "text", "ar"], {"exact": True}),
    "plan_is_given": (["hier", "bd3lm", "joint"], {"plan_is_given": True}),
    "bernoulli": (["hier", "mdlm"], {"estimator": "bernoulli"}),
}

# name -> models, settings of `HierBD3LMTrainingArguments`, fields of the configuration that differ
CLIPS = {"plan_clip": [0.3, 0.8], "execution_clip": [0.45, 0.95]}
SEARCH = {"clip_search": [0.5], "clip_search_levels": 4, "eval_strategy": "steps", "eval_steps": 1}
TRAININGS = {
    "plain": (MODELS, {}, {}),
    "noisy_copies": (["hier", "joint"], {"noisy_copies": 2}, {}),
    "clip": (["hier"], {}, CLIPS),
    "filler_weight": (["hier", "bd3lm"], {"filler_weight": 0.5}, {}),
    "muon": (["hier"], {"muon_learning_rate": 1e-2}, {}),
    "bernoulli": (["hier"], {"estimator": "bernoulli"}, {}),
    "clip_search": (["hier", "bd3lm"], SEARCH, {}),
    "ema": (["hier"], {"ema_decay": 0.9, "eval_strategy": "steps", "eval_steps": 1}, {}),
    "accumulated": (["hier"], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
}
LOGGED = ("loss", "grad_norm", "loss_plan", "loss_execution", "eval_nll")

CHECKPOINT_MODELS = ("hier", "bd3lm")

QUESTIONS = [[7, 8, 9], [20, 21, 22, 23, 24, 25, 26], [17]]
PLANS = [[11, 22, 33, 14, 25], [12], [30, 31, 32, 33, 34, 35, 36, 37, 38]]


def make_model(name: str, **overrides: Any) -> HierBD3LMForBlockDiffusion:
    """A random model in float64 that says `<|end|>` and `<|execution|>` now and then."""
    backbone = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    token_ids = {f"{role}_token_id": token for role, token in TOKEN_IDS.items()}
    config = HierBD3LMConfig(backbone_config=backbone, **(token_ids | LENGTHS | MODELS[name] | overrides))
    model = HierBD3LMForBlockDiffusion._from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(SEEDS.get(name, 2))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=0.4, generator=generator)
        for role in ("end", "execution"):  # seldom the likeliest token otherwise
            model.get_output_embeddings().weight[TOKEN_IDS[role]] *= 2
    return model.double().eval()


shared_model = functools.cache(make_model)  # for cases that change no weight


def left_pad(rows: list[list[int]]) -> torch.LongTensor:
    width = max(map(len, rows))
    return torch.tensor([[TOKEN_IDS["pad"]] * (width - len(row)) + row for row in rows], dtype=torch.long)


def right_pad(rows: list[list[int]]) -> torch.LongTensor:
    width = max(map(len, rows))
    return torch.tensor([row + [TOKEN_IDS["pad"]] * (width - len(row)) for row in rows], dtype=torch.long)


def make_examples(config: HierBD3LMConfig, count: int = 8) -> Dataset:
    """Random examples of many lengths; text without a question goes on in other rows now and then."""
    generator = torch.Generator().manual_seed(0)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(most + 1, (), generator=generator))
        return torch.randint(FIRST_CONTENT_ID, VOCAB_SIZE, (length,), generator=generator).tolist()

    rows = []
    for number in range(count):
        row = {"question_ids": tokens(9), "plan_ids": tokens(9 if config.plan_len else 0), "execution_ids": tokens(12)}
        if config.question_len == 0:
            row |= {"question_ids": [], "continues": number % 3 == 0}
            row["execution_ids"] += [FIRST_CONTENT_ID] * (not row["execution_ids"])
        rows.append(row | {"length": sum(len(row[f"{name}_ids"]) for name in ("question", "plan", "execution"))})
    return Dataset.from_list(rows)


def generate(model: HierBD3LMForBlockDiffusion, rows: int, **settings: Any) -> dict[str, Any]:
    """What `generate` answers to the first `rows` questions."""
    questions = QUESTIONS[:rows] if model.config.question_len else [[]] * rows
    is_given = settings.get("stage") == "execution"
    output = model.generate(left_pad(questions), plan_ids=right_pad(PLANS[:rows]) if is_given else None, **settings)
    names = ("sequences", "plan", "execution", "finished", "num_forward_passes", "tokens_per_forward")
    return {name: getattr(output, name).tolist() for name in names}


def generate_case(case: str, **overrides: Any) -> dict[str, Any]:
    """The generation of a case `<model>/<settings>`."""
    model, name = case.split("/")
    return generate(shared_model(model), 1 if name == "alone" else 3, **(GENERATIONS[name][1] | overrides))


def likelihood(model: str, **arguments: Any) -> dict[str, Any]:
    """Nats per token with what they average over; bits and perplexities are functions of them."""
    examples = make_examples(shared_model(model).config)
    metrics = measure_likelihood(shared_model(model), examples, num_draws=4, seed=5, **arguments)
    return {name: value for name, value in metrics.items() if not name.endswith(("bpd", "ppl"))}


def train(model: str, settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """What three steps of the trainer log, and the clip intervals that it leaves."""
    trained = make_model(model, **fields)
    examples = make_examples(trained.config)
    defaults = {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
    defaults |= {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "ema_decay": 0.0, "seed": 7}
    with tempfile.TemporaryDirectory() as folder:
        trainer = HierBD3LMTrainer(
            trained,
            HierBD3LMTrainingArguments(output_dir=folder, **(defaults | settings)),
            train_dataset=examples,
            eval_dataset=examples,
            data_collator=HierarchicalDataCollator(trained.config),
        )
        trainer.train()
    history = trainer.state.log_history
    values = {name: [entry[name] for entry in history if name in entry] for name in LOGGED}
    values = {name: logged for name, logged in values.items() if logged}
    searches = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "ClipSearch"]
    chosen = searches[0].chosen if searches else {}
    clips = {name: chosen.get(name, chosen.get("all")) for name in ("plan", "execution")}
    return values | {f"{name}_clip": clip or getattr(trained.config, f"{name}_clip") for name, clip in clips.items()}


def collate(model: str, fixed_length: bool) -> dict[str, Any]:
    """Shape and SHA-256 of every tensor of a batch."""
    config = shared_model(model).config
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(list(make_examples(config, 4)))
    names = ("input_ids", "segment_ids", "block_ids", "position_ids", "labels")
    values = {name: hashlib.sha256(json.dumps(batch[name].tolist()).encode()).hexdigest()[:16] for name in names}
    return values | {"shape": list(batch["input_ids"].shape)}


def write_checkpoint(name: str) -> None:
    """Saves a model as `save_pretrained` does, without the code that is copied beside it."""
    model = make_model(name).float()
    model.generation_config.update(**SAMPLERS["entropy"], seed=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        target = CHECKPOINTS / name
        target.mkdir(parents=True)
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (target / file).write_bytes((Path(folder) / file).read_bytes())


def generate_from_checkpoint(name: str) -> dict[str, Any]:
    """Ids by the settings that were saved, with the model in float64."""
    return generate(HierBD3LMForBlockDiffusion.from_pretrained(CHECKPOINTS / name).double().eval(), 3)


def all_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Every case that is recorded, by its name `<kind>/<model>/<settings>`."""
    cases = {}
    for name, (models, _) in GENERATIONS.items():
        for model in models:
            if MODELS[model].get("algorithm") != "ar" or name in CAUSAL:
                cases[f"generate/{model}/{name}"] = functools.partial(generate_case, f"{model}/{name}")
    for name, (models, arguments) in LIKELIHOODS.items():
        cases |= {f"likelihood/{model}/{name}": functools.partial(likelihood, model, **arguments) for model in models}
    for name, (models, *settings) in TRAININGS.items():
        cases |= {f"train/{model}/{name}": functools.partial(train, model, *settings) for model in models}
    for name, is_fixed in (("dynamic", False), ("fixed", True)):
        cases |= {f"collate/{model}/{name}": functools.partial(collate, model, is_fixed) for model in MODELS}
    return cases | {
        f"checkpoint/{model}/saved": functools.partial(generate_from_checkpoint, model) for model in CHECKPOINT_MODELS
    }


def read_values() -> dict[str, dict[str, Any]]:
    return json.loads(VALUES.read_text(encoding="utf-8"))


def write_values(values: dict[str, dict[str, Any]]) -> None:
    """One case a line, so that a change shows which ones it is of."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in values.items()]
    VALUES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="record the cases that values.json has already anew")
    arguments = parser.parse_args()
    known = read_values() if VALUES.exists() else {}
    for name in CHECKPOINT_MODELS:  # those of an earlier version are kept, as it is their point to be earlier
        if not (CHECKPOINTS / name).exists():
            write_checkpoint(name)
    kept = {name for name in known if not arguments.all or name.startswith("checkpoint/")}
    write_values({name: known[name] if name in kept else compute() for name, compute in all_cases().items()})


if __name__ == "__main__":
    main()
