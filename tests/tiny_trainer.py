"""A trainer on tiny random models and examples, and what its tests compare with."""

import math

import torch

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments

from .tiny import make_dataset, make_model

SEGMENTS = {"plan": PLAN, "execution": EXECUTION}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}


def seeded_model(**overrides):
    torch.manual_seed(0)
    return make_model(**overrides)


def make_trainer(folder, model=None, num_examples=8, callbacks=None, **settings):
    """A trainer on the CPU with random examples, and the same initial weights each time."""
    model = seeded_model() if model is None else model
    dataset = settings.pop("train_dataset", None) or make_dataset(num_examples, model.config)
    eval_dataset, tokenizer = settings.pop("eval_dataset", dataset), settings.pop("tokenizer", None)
    defaults = {
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.0,
    }
    return HierBD3LMTrainer(
        model,
        HierBD3LMTrainingArguments(output_dir=str(folder), **(defaults | settings)),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=HierarchicalDataCollator(model.config),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def whole_batch(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def counted_tokens(dataset):
    """Plan and execution: their content and one <|end|> each."""
    return {segment: sum(len(row[f"{segment}_ids"]) + 1 for row in dataset) for segment in SEGMENTS}


def nelbo_by_hand(model, batch, masked, weights):
    """Compute the NELBO token by token, from the logits of every position."""
    xt = batch["input_ids"].masked_fill(masked, model.config.mask_token_id)
    logits = model(input_ids=batch["input_ids"], noisy_input_ids=xt, segment_ids=batch["segment_ids"]).logits
    total = 0.0
    for row, column in masked.nonzero().tolist():
        scores = logits[row, column].double()
        scores[model.config.mask_token_id] = -math.inf
        nll = scores.logsumexp(0) - scores[batch["input_ids"][row, column]]
        total += weights[row, column] * nll
    return total


def fully_masked_nats(model, batch):
    """The NELBO of blocks of one token."""
    maskable = model.order.predicted(batch["input_ids"], batch["segment_ids"])
    return nelbo_by_hand(model, batch, maskable, maskable.float())
