"""Packing several examples into a row changes neither loss nor gradient."""

import os

import pytest
import torch
from datasets import Dataset

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.collator import HierarchicalDataCollator, encode_example, example_length
from hierbd3lm.data.splits import load_split
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.masking_hierbd3lm import PADDING, PackedRows
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.length_sampler import EpochLengthSampler
from hierbd3lm.training.objectives import make_objective
from hierbd3lm.training.packing import assign_rows, row_lengths

from .test_resuming import RUN, final_state
from .tiny import make_dataset, make_model
from .tiny_algorithms import ALL, OWN_SIZE
from .tiny_backbones import BACKBONES, make_backbone_config
from .tiny_trainer import SGD, assert_bit_equal, losses_of, make_trainer, seeded_model, weights_of

SHIFTED = {"prediction": "shifted", "question_attention": "causal"}
ONE_STREAM = "shifted, blocks of one token after a bidirectional question"
MODELS = ALL | {
    "shifted": SHIFTED,
    "shifted, in place of the question": {"prediction": "shifted"},
    "shifted, blocks of one token": SHIFTED | {"block_size": 1},
    ONE_STREAM: {"prediction": "shifted", "block_size": 1},
    "shifted, flat": SHIFTED | {"algorithm": "bd3lm"},
    "causal question": {"question_attention": "causal"},
    "blocks of one token": {"block_size": 1},
    "two block sizes": {"block_size": None, "plan_block_size": 2, "execution_block_size": 8},
    "ar, no plan": {"algorithm": "ar", "plan_len": 0, **OWN_SIZE},
}
ROWS = torch.tensor([1, 0, 1, 2, 0, 1])  # of the six examples; not in order


def make_packed(rows=ROWS, backbone="qwen3", **overrides):
    """A model, in float64 with `sdpa`, and a batch without and with packing."""
    torch.manual_seed(0)
    backbone_config = make_backbone_config(backbone, tie_word_embeddings=False)
    attention = {"attn_implementation": "eager" if backbone == "gemma2" else "sdpa"} | overrides
    model = make_model(backbone_config=backbone_config, **attention)
    model = model.double() if model.backbone.config._attn_implementation == "sdpa" else model
    limits = {"plan": (0, 0)} if model.config.plan_len == 0 else {}
    examples = list(make_dataset(len(rows), model.config, **limits))
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))
    return model, batch, batch | {"row_ids": rows}


def nelbo(model, batch, **settings):
    generator = torch.Generator().manual_seed(0)
    return make_objective(model.config).token_nelbo(model, batch, generator, **settings)


def pass_shapes(model):
    """Shapes of the tokens of every pass from now on."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    return shapes


# The loss


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_of_its_examples(name):
    model, batch, packed = make_packed(**MODELS[name])
    shapes = pass_shapes(model)
    actual, expected = nelbo(model, packed), nelbo(model, batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
    assert expected.sum() > 1
    (rows, width), (batch_size, longest) = shapes
    assert (rows, batch_size) == (3, 6)
    assert width < 6 * longest


@pytest.mark.parametrize("name", ["hier", "bd3lm", "shifted", "shifted, blocks of one token", "ar"])
def test_a_packed_batch_has_the_exact_bound_of_its_examples(name):
    model, batch, packed = make_packed(**MODELS[name])
    objective = make_objective(model.config)
    with torch.no_grad():
        actual, expected = objective.exact(model, packed), objective.exact(model, batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["hier", "mdlm", "joint, with the mask", "shifted"])
def test_noisy_copies_share_the_row_of_their_example(name):
    model, batch, packed = make_packed(**MODELS[name])
    actual, expected = nelbo(model, packed, noisy_copies=3), nelbo(model, batch, noisy_copies=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["hier", "shifted", "shifted, blocks of one token", "ar"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_architecture_packs(name, backbone):
    model, batch, packed = make_packed(backbone=backbone, **MODELS[name])
    torch.testing.assert_close(nelbo(model, packed), nelbo(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hier", "shifted, blocks of one token"])
def test_eager_attention_packs(name):
    model, batch, packed = make_packed(attn_implementation="eager", **MODELS[name])
    torch.testing.assert_close(nelbo(model, packed), nelbo(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_example_has_no_gradient_from_another_one_of_its_row(name):
    """The examples have no content token in common: of each the rows of the input embeddings say what it reads."""
    model, _, packed = make_packed(torch.zeros(4, dtype=torch.long), **MODELS[name])
    own = 5 + packed["input_ids"] % 8 + 8 * torch.arange(4)[:, None]
    packed["input_ids"] = torch.where(packed["input_ids"] >= 5, own, packed["input_ids"])
    embeddings = model.get_input_embeddings().weight
    of_each = nelbo(model, packed).sum(dim=1)
    for example in range(4):
        (gradient,) = torch.autograd.grad(of_each[example], embeddings, retain_graph=True)
        changed = gradient.abs().sum(dim=1) > 0
        first = 5 + 8 * example
        assert not changed[5:first].any() and not changed[first + 8 : 5 + 32].any()
        assert changed[first : first + 8].any()


@pytest.mark.parametrize("name", ["hier", "mdlm", "ar", "shifted", ONE_STREAM])
def test_the_lengths_of_a_pass_are_those_of_the_tokens_in_it(name):
    model, batch, packed = make_packed(torch.zeros(6, dtype=torch.long), **MODELS[name])
    shapes, objective = pass_shapes(model), make_objective(model.config)
    copies = 2 if objective.has_noise else 1
    nelbo(model, packed, noisy_copies=copies)
    assert shapes == [(1, int(objective.pass_lengths(batch, copies).sum()))]


def test_rows_hold_their_examples_in_the_order_of_the_batch():
    chosen = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    rows = PackedRows.of(chosen, torch.tensor([1, 0, 1]))
    values = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert rows.pack(values, PADDING).tolist() == [[4, 5, 6], [2, 3, 7]]
    alone = PackedRows.of(chosen)
    assert alone.pack(values, PADDING).tolist() == [[2, 3, -1], [4, 5, 6], [7, -1, -1]]


def test_rows_without_what_they_need_are_refused():
    model, _, packed = make_packed()
    with pytest.raises(ValueError, match="`row_ids` must be given with `logits_to_keep` and without `example_ids`"):
        model(packed["input_ids"], segment_ids=packed["segment_ids"], row_ids=packed["row_ids"])


# Rows


def pass_share(lengths, rows):
    """Share of a pass's tokens that are no padding."""
    totals = [sum(n for n, its in zip(lengths, rows, strict=True) if its == row) for row in range(max(rows) + 1)]
    return sum(lengths) / (len(totals) * max(totals))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([100, 99, 98, 100], [0, 1, 2, 3]),  # as many rows as examples
        ([100, 50, 50, 100], [0, 1, 1, 2]),
        ([10, 90, 30, 70, 50, 50], [0, 0, 1, 1, 2, 2]),
        ([100, 60, 20], [0, 1, 1]),
        ([100, 30, 30, 5], [0, 1, 1, 1]),
        ([100, 10], [0, 0]),
        ([1000, 100, 100, 100], [0, 0, 0, 0]),
        ([7], [0]),
    ],
)
def test_rows_are_of_about_equal_lengths(lengths, expected):
    rows = assign_rows(lengths, hidden_size=64)
    names = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    assert [names[row] for row in rows] == expected


def test_wide_models_have_longer_rows_with_less_padding():
    lengths = [300, 200, 210, 150, 260, 120, 90, 310]
    rows = [assign_rows(lengths, hidden_size) for hidden_size in (1, 576, 100_000)]
    assert [max(row) + 1 for row in rows] == [6, 4, 1]
    assert pass_share(lengths, rows[0]) < pass_share(lengths, rows[1]) < pass_share(lengths, rows[2]) == 1
    assert row_lengths(lengths, rows[2]) == [sum(lengths)]


# Training


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"noisy_copies": 2},
        {"filler_weight": 0.3, "estimator": "bernoulli"},
        {"clip_search": [0.5], "clip_search_levels": 4, "eval_strategy": "steps", "eval_steps": 2},
        {"block_size_schedule": {0: 1, 2: 2, 3: 4}},
        {"optim": "adamw_torch", "ema_decay": 0.9},
    ],
    ids=lambda settings: ", ".join(settings) or "default",
)
@pytest.mark.parametrize("name", ["hier", "shifted"])
def test_a_run_with_packing_learns_what_one_without_does(tmp_path, name, settings):
    settings = SGD | {"max_steps": 5, "num_examples": 10, "train_sampling_strategy": "random"} | settings
    plain, packed = (
        make_trainer(tmp_path, seeded_model(**MODELS[name]), packing=packing, **settings) for packing in (False, True)
    )
    plain.train()
    packed.train()
    for loss in ("loss", "loss_plan", "loss_execution", "eval_nll"):
        assert losses_of(packed, loss) == pytest.approx(losses_of(plain, loss), rel=1e-4)
    for weight, expected in zip(weights_of(packed.model).values(), weights_of(plain.model).values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def test_packing_reaches_the_passes_of_training_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, num_examples=10, packing=True, per_device_train_batch_size=5)
    shapes = pass_shapes(trainer.model)
    trainer.train()
    assert len(shapes) == 2 and all(rows < 5 for rows, _ in shapes)
    trainer.evaluate()
    assert all(rows < 8 for rows, _ in shapes[2:])


@pytest.mark.slow
def test_a_resumed_run_with_packing_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    whole = make_trainer(tmp_path, seeded_model(), packing=True, **RUN)
    whole.train()
    for step in (2, 5):  # within the first epoch, within the second
        resumed = make_trainer(tmp_path / "resumed", seeded_model(), packing=True, **RUN)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_bit_equal(final_state(resumed), final_state(whole))


def test_fixed_lengths_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    collator = HierarchicalDataCollator(trainer.model.config, fixed_length=True)
    arguments = HierBD3LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, packing=True)
    with pytest.raises(ValueError, match="`packing` must be False with `fixed_length`"):
        type(trainer)(trainer.model, arguments, train_dataset=trainer.train_dataset, data_collator=collator)


@pytest.mark.parametrize("name", ["hier", "shifted, blocks of one token", "joint, with the mask"])
def test_batches_are_grouped_by_the_lengths_of_a_pass(tmp_path, name):
    trainer = make_trainer(tmp_path, seeded_model(**MODELS[name]), num_examples=40, packing=True)
    collate = trainer.data_collator
    lengths = [
        int(trainer.objective.pass_lengths(with_predicted_tokens(trainer.model, collate([example]))))
        for example in trainer.train_dataset
    ]
    expected = EpochLengthSampler(4, lengths, trainer.args.seed, lambda: 0)
    in_batches = [[lengths[row] for row in order] for order in (trainer._get_train_sampler(), expected)]
    assert in_batches[0] == in_batches[1]


def test_a_growing_model_is_grouped_by_the_pass_of_its_largest_blocks(tmp_path):
    """The order of an epoch must not depend on the block size at the step where the run resumes."""
    model = seeded_model(**SHIFTED)
    settings = {"num_examples": 40, "packing": True, "max_steps": 9}
    growing = make_trainer(tmp_path, seeded_model(**SHIFTED), block_size_schedule={0: 1, 3: 4}, **settings)
    largest = make_trainer(tmp_path, model, **settings)
    assert list(growing._get_train_sampler()) == list(largest._get_train_sampler())


def test_a_run_is_not_resumed_in_another_order(tmp_path):
    make_trainer(tmp_path, **RUN).train()
    packed = make_trainer(tmp_path / "resumed", packing=True, **RUN)
    with pytest.raises(ValueError, match="packing: False stored, True now"):
        packed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# GSM8K


@pytest.mark.slow
@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR must name a folder with GSM8K's train.jsonl")
def test_nearly_all_tokens_of_a_pass_over_gsm8k_are_real(tmp_path):
    """Batches of 8 and of 16 training problems, with the hidden size of SmolLM2-135M."""
    rows = load_split(DataArguments(dataset="openai/gsm8k"), "train").select(range(1600))
    texts = (text for name in ("question", "plan", "execution") for text in rows[name])
    tokenizer = train_tokenizer(texts, 4096)
    backbone = make_backbone_config("llama", hidden_size=576, max_position_embeddings=2048, vocab_size=5000)
    limits = {"question_len": 512, "plan_len": 512, "execution_len": 1024, "backbone_config": backbone}
    for block_size in (1, 4):
        model = make_model(block_size=block_size, **SHIFTED, **limits, **special_token_ids(tokenizer))
        examples = [encode_example(row, tokenizer) for row in rows]
        dataset = Dataset.from_list([row | {"length": example_length(row, model.config)} for row in examples])
        for size in (8, 16):
            settings = {"train_dataset": dataset, "packing": True, "per_device_train_batch_size": size}
            trainer, real, total = make_trainer(tmp_path, model, **settings), 0, 0
            for inputs in trainer.get_train_dataloader():
                batch = trainer._read_batch(inputs)
                lengths = trainer.objective.pass_lengths(batch).tolist()
                real += sum(lengths)
                total += sum(lengths) / pass_share(lengths, batch["row_ids"].tolist())
            assert real / total >= 0.95, (block_size, size, real / total)
