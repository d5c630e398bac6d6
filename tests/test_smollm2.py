"""A real open checkpoint, SmolLM2-135M-Instruct, keeps what it knows when it is converted."""

import copy
import functools
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hierbd3lm import HierarchicalDataCollator, HierBD3LMForBlockDiffusion
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.training.block_growth import resize_blocks
from hierbd3lm.training.objectives import make_objective

FOLDER = os.environ.get("SMOLLM2_DIR", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(FOLDER, "config.json").is_file(), reason="SMOLLM2_DIR must name a checkpoint folder"),
]
LENGTHS = {"question_len": 128, "plan_len": 64, "execution_len": 128}
EXAMPLE = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "plan": "1. Natalia sold clips in May: 48 / 2\n2. Natalia sold clips altogether: 48 + [1]",
    "execution": "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.\n#### 72",
}


@functools.cache
def converted():
    """The converted checkpoint with blocks of one token, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = HierBD3LMForBlockDiffusion.from_autoregressive(FOLDER, tokenizer, block_size=1, **LENGTHS)
    return model.eval(), tokenizer


@torch.no_grad()
def test_its_likelihood_is_that_of_the_checkpoint():
    model, tokenizer = converted()
    checkpoint = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config, tokenizer)([EXAMPLE]))
    ids, predicted = batch["input_ids"], batch["maskable"] & (batch["input_ids"] < checkpoint.config.vocab_size)
    nll = make_objective(model.config).token_nelbo(model, batch)[predicted]
    # The checkpoint has no rows for the openers: it reads those that they were given.
    vocabulary = checkpoint.config.vocab_size
    logits = checkpoint(inputs_embeds=model.get_input_embeddings()(ids)).logits[0].log_softmax(dim=-1)
    ours = model(ids).logits[0, :, :vocabulary].log_softmax(dim=-1)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    # `<|end|>` starts as a twin of the EOS token: what the EOS token has of the probability is there twice.
    expected = -logits[:-1].gather(1, ids[0, 1:, None].clamp(max=vocabulary - 1))[:, 0][predicted[0, 1:]]
    assert (nll - expected).abs().median() < 1e-4
    assert (nll - expected).mean().abs() < 0.02
    assert 0.5 < float(nll.mean()) < 3


@torch.no_grad()
def test_it_writes_greedily_what_the_checkpoint_writes():
    model, tokenizer = converted()
    subjects = ["A train", "Mia", "The shop", "A farmer", "Our class", "The library", "A cook", "Leo", "A ship", "She"]
    verbs = ["has 12 boxes", "travels 60 miles", "sells 9 books", "needs 7 eggs", "finds 15 shells"]
    ids, config = model.config, model.config
    unwritten = [ids.mask_token_id, ids.plan_token_id, ids.execution_token_id, ids.pad_token_id]
    for question in (f"{subject} {verb}. How many are left?" for subject in subjects for verb in verbs):
        inputs = tokenizer(question, return_tensors="pt")
        output = model.generate(**inputs, stage="plan", sampler="first_hitting", max_plan_len=9)
        prompt = torch.cat([inputs["input_ids"], torch.tensor([[config.plan_token_id]])], dim=1)
        written = model.backbone.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=config.end_token_id,
            pad_token_id=config.pad_token_id,
            suppress_tokens=unwritten,
        )
        assert output.sequences[0].tolist() == written[0].tolist()


@torch.no_grad()
def test_larger_blocks_are_trained_from_the_same_weights_with_a_finite_bound():
    model, tokenizer = converted()
    larger = copy.copy(model)  # the same weights
    larger.config = copy.deepcopy(model.config)
    resize_blocks(larger, 4)
    batch = with_predicted_tokens(larger, HierarchicalDataCollator(larger.config, tokenizer)([EXAMPLE]))
    nelbo = make_objective(larger.config).token_nelbo(larger, batch, torch.Generator().manual_seed(0))
    assert 2 < float(nelbo.sum() / batch["maskable"].sum()) < 12
