"""Models and batches of the benchmarks."""

import os
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import HierarchicalDataCollator, encode_example, example_length
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

BACKBONE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
SMOLLM2 = {  # of SmolLM2-135M
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3 = {  # of Qwen3-0.6B
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SPECIAL_IDS = {"pad": 0, "end": 1, "plan": 2, "execution": 3, "mask": 4}
FIRST_CONTENT_ID = 5


def make_model(
    vocab_size: int = 4096, backbone: dict[str, Any] = BACKBONE, **fields: object
) -> HierBD3LMForBlockDiffusion:
    """Make a random model with block size 16; the backbone's own vocabulary size comes before `vocab_size`."""
    torch.manual_seed(0)
    ids = {f"{role}_token_id": token for role, token in SPECIAL_IDS.items()}
    backbone = {"vocab_size": vocab_size} | backbone
    return HierBD3LMForBlockDiffusion._from_config(
        HierBD3LMConfig(backbone_config=backbone, **({"block_size": 16} | ids | fields))
    )


def text_batch(batch_size: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Make a batch of random plain text: no question, only execution."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(FIRST_CONTENT_ID, vocab_size, (batch_size, length), generator=generator)
    return {"input_ids": input_ids, "segment_ids": torch.full_like(input_ids, 2)}


def problem_batches(num_batches: int, batch_size: int) -> tuple[list[dict], PreTrainedTokenizerBase, list[list[dict]]]:
    """Make length-grouped batches of GSM8K's training split if `GSM8K_DIR` is set, else of synthetic problems.

    Returns:
        the collated batches, the tokenizer (BPE of 4096, or word-level), and the encoded examples of each batch.
    """
    from hierbd3lm.data.arguments import DataArguments
    from hierbd3lm.data.splits import load_split  # of `datasets`, which gpu.py does without

    is_real = bool(os.environ.get("GSM8K_DIR"))
    args = DataArguments(dataset="openai/gsm8k") if is_real else DataArguments(num_train_examples=4096)
    dataset = load_split(args, "train")
    columns = ("question", "plan", "execution")
    tokenizer = train_tokenizer((text for name in columns for text in dataset[name]), 4096 if is_real else None)
    config = HierBD3LMConfig(
        backbone_config=BACKBONE | {"vocab_size": max(4096, len(tokenizer))}, **special_token_ids(tokenizer)
    )
    examples = [encode_example(row, tokenizer) for row in dataset.select(range(50 * batch_size))]
    examples.sort(key=lambda example: example_length(example, config))
    groups = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    chosen = [groups[(2 * i + 1) * len(groups) // (2 * num_batches)] for i in range(num_batches)]  # all lengths
    collate = HierarchicalDataCollator(config)
    return [collate(group) for group in chosen], tokenizer, chosen
