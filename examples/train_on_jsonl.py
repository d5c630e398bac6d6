"""Train a tiny model from scratch on a JSON lines file, and generate: `python examples/train_on_jsonl.py`."""

import json
import random
from pathlib import Path

from transformers import PreTrainedTokenizerBase, set_seed

import hierbd3lm
from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.tokenization import train_tokenizer

FOLDER = Path("outputs/apples")
QUESTION = "Mia has {red} red, {green} green and {blue} blue apples. How many apples does Mia have?"
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3}
SIZES |= {"num_key_value_heads": 3, "head_dim": 32, "initializer_range": 0.1, "tie_word_embeddings": True}
TRAINING = {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "muon_learning_rate": 0.02}
TRAINING |= {"warmup_steps": 20, "ema_decay": 0.95, "logging_steps": 100, "save_strategy": "no", "use_cpu": True}


def write_problems(path: Path, count: int) -> None:
    """The plan says in which order three numbers are added; the execution follows it."""
    draw, lines = random.Random(0), []
    for _ in range(count):
        apples = {colour: draw.randint(1, 9) for colour in ("red", "green", "blue")}
        first, second, third = draw.sample(list(apples), 3)
        a, b, c = apples[first], apples[second], apples[third]
        steps = f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}\n#### {a + b + c}"
        plan = f"{first} + {second}\n+ {third}"
        lines.append(json.dumps({"question": QUESTION.format(**apples), "plan": plan, "execution": steps}) + "\n")
    path.write_text("".join(lines))


def train(folder: Path) -> PreTrainedTokenizerBase:
    """Writes the problems, trains and saves a model; returns its tokenizer. About a minute on one CPU core."""
    set_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "problems.jsonl", 4000)
    dataset = hierbd3lm.load_reasoning_dataset(folder / "problems.jsonl")
    tokenizer = train_tokenizer(text for name in ("question", "plan", "execution") for text in dataset[name])
    fields = special_token_ids(tokenizer) | {"question_len": 32, "plan_len": 8, "execution_len": 24, "block_size": 4}
    config = hierbd3lm.HierBD3LMConfig(backbone_config=SIZES | {"vocab_size": len(tokenizer)}, **fields)
    trainer = hierbd3lm.HierBD3LMTrainer(
        hierbd3lm.HierBD3LMForBlockDiffusion(config),
        hierbd3lm.HierBD3LMTrainingArguments(str(folder), report_to="none", **TRAINING),
        train_dataset=hierbd3lm.prepare_dataset(dataset, tokenizer, config)[0],
        data_collator=hierbd3lm.HierarchicalDataCollator(config),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return tokenizer


if __name__ == "__main__":
    tokenizer = train(FOLDER)
    question = tokenizer(QUESTION.format(red=4, green=3, blue=2), return_tensors="pt")
    model = hierbd3lm.HierBD3LMForBlockDiffusion.from_pretrained(FOLDER)
    print(tokenizer.decode(model.generate(**question).sequences[0]))
