"""Tiny checkpoints and requests for the adapter of lm-evaluation-harness."""

from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from transformers import Qwen3Config

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.tokenization import train_tokenizer

from .tiny import make_model

TASKS = Path(__file__).parents[1] / "evaluation" / "lm_eval" / "tasks"
DIGITS = [str(digit) for digit in range(10)]
GREEDY = {"until": ["\n\n"], "do_sample": False, "temperature": 0.0}


def save_checkpoint(folder, written=DIGITS, seed=0, **fields):
    """Save a random model that only generates `written` and `<|end|>`: the logits of other tokens are 0."""
    tokenizer = train_tokenizer(["Mia has apples.", "?", "####"])
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    fields = {"question_len": 12, "plan_len": 8, "execution_len": 12, "block_size": 4} | fields
    torch.manual_seed(seed)
    model = make_model(**special_token_ids(tokenizer), backbone_config=backbone, **fields)
    head = model.get_output_embeddings().weight.data
    kept = torch.tensor([model.config.end_token_id, *(tokenizer.get_vocab()[token] for token in written)])
    rows = head[kept] * 3
    head.zero_()
    head[kept] = rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def requests_of(kind, *arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


QUESTIONS = ["Mia has 3 apples.", "1?", "Mia", "Mia has 12 apples. 7?"]
