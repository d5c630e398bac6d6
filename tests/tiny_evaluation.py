"""Fixtures of evaluation (see conftest.py): a tiny checkpoint, its arguments, and scripted answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.splits import load_split
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation.arguments import EvaluationArguments
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .tiny import make_model

SYNTHETIC = SyntheticConfig()
FOREIGN_TOKEN = "<|im_end|>"  # a special token of the backbone's tokenizer that ends a generated text
SHORT = {"max_plan_len": 8, "max_execution_len": 8}
MODEL_SETTINGS = {name for name in vars(HierBD3LMGenerationConfig()) if name[0] != "_"} - {"transformers_version"}


def read_lines(args):
    return [json.loads(line) for line in Path(args.output_dir, "predictions.jsonl").read_text("utf-8").splitlines()]


def read_summary(args):
    return json.loads(Path(args.output_dir, "summary.json").read_text("utf-8"))


def without_time(values):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in values]


class Scripted:
    """Stands in for `generate`: writes texts that are looked up by the question, in a pass per 4 tokens.

    A question has a pair of plan and execution, or a list of them of which every call takes the next.
    """

    def __init__(self, checkpoint, texts):
        self.tokenizer, self.texts, self.batches = AutoTokenizer.from_pretrained(checkpoint + "/tokenizer"), texts, []

    def __call__(self, model, input_ids, attention_mask, plan_ids=None, generation_config=None, **others):
        questions = [
            self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        self.batches.append(questions)
        pairs = [self.texts[question] for question in questions]
        pairs = [pair.pop(0) if isinstance(pair, list) else pair for pair in pairs]
        plans, executions = ([self.tokenizer(pair[part])["input_ids"] for pair in pairs] for part in (0, 1))
        num_tokens = torch.tensor([len(plan) + len(steps) + 2 for plan, steps in zip(plans, executions, strict=True)])
        passes = (num_tokens + 3) // 4
        columns = torch.arange(int(num_tokens.amax()))
        return SimpleNamespace(
            plan_followed=None,
            reveal_steps=(columns // 4 + 1) * (columns < num_tokens[:, None]),
            plan=self.pad(plans),
            execution=self.pad(executions),
            num_forward_passes=passes,
            tokens_per_forward=num_tokens / passes,
            finished=torch.ones(len(questions), dtype=torch.bool),
        )

    def pad(self, rows):
        widest = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (widest - len(row)) for row in rows])


# Fixtures


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model that was "trained" on the synthetic problems."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([*vocabulary_texts(SYNTHETIC), " Question: ####"])
    tokenizer.add_special_tokens({"extra_special_tokens": [FOREIGN_TOKEN]}, replace_extra_special_tokens=False)
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = make_model(
        **special_token_ids(tokenizer), backbone_config=backbone, question_len=96, plan_len=32, execution_len=32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DataArguments(synthetic={"num_steps": [1, 2]}).save(folder)
    return str(folder)


@pytest.fixture
def args(checkpoint, tmp_path):
    def make(**fields):
        defaults = {"model": checkpoint, "output_dir": str(tmp_path / "eval"), "limit": 10, "batch_size": 3}
        return EvaluationArguments(**(defaults | {"device": "cpu"} | SHORT | fields))

    return make


@pytest.fixture
def rows():
    return load_split(DataArguments(synthetic={"num_steps": [1, 2]}), "test", 10).to_list()


@pytest.fixture
def dataset_of(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def script(checkpoint, monkeypatch, tmp_path):
    def install(texts):
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(tmp_path / "tokenizer")
        scripted = Scripted(str(tmp_path), texts)
        monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", lambda model, **kwargs: scripted(model, **kwargs))
        return scripted

    return install
