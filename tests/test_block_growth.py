"""Block sizes that change during a training run."""

import json
import shutil

import pytest
import torch

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.order_hierbd3lm import BlockOrder
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.block_growth import lay_out_blocks, read_schedule, resized, resolve_schedule, size_at

from .test_resuming import RUN, final_state, make_dropout_model
from .tiny import make_config, make_dataset, make_model
from .tiny_trainer import assert_bit_equal, losses_of, make_trainer, seeded_model, weights_of

GROWTH = {0: 1, 2: 2, 0.6: 4}  # in a run of seven steps: 1 1 2 2 4 4 4
SIZES = [1, 1, 2, 2, 4, 4, 4]


def largest_block(record):
    """Most maskable tokens of a block in a recorded draw."""
    row = torch.arange(len(record.block_ids))[:, None].expand_as(record.block_ids)
    pairs = torch.stack([row[record.maskable], record.block_ids[record.maskable]], dim=1)
    return int(pairs.unique(dim=0, return_counts=True)[1].max())


# The schedule


@pytest.mark.parametrize("value", [{0: 1, 0.4: 2, 600: 4}, "{0: 1, 0.4: 2, 600: 4}", '{"0": 1, "0.4": 2, "600": 4}'])
def test_a_schedule_is_read_from_a_mapping_yaml_or_json(value):
    assert read_schedule(value) == {0: 1, 0.4: 2, 600: 4}
    assert [type(start) for start in read_schedule(value)] == [int, float, int]


@pytest.mark.parametrize(
    "value, message",
    [
        ("4", "must be a mapping such as .*, but got 4"),
        ("{0: 1", "must be a mapping such as .*, but got '{0: 1'"),
        ({}, "must be a mapping"),
        ({1: 1}, r"must have the block size of step 0, but got \{1: 1\}"),
        ({0: 1, 1.0: 2}, r"fractions of the run in \[0, 1\), but got 1.0"),
        ({0: 1, -1: 2}, "but got -1"),
        ({0: 1, True: 2}, "but got True"),
        ({0: 1, "half": 2}, "but got 'half'"),
        ({0: 0}, "block sizes >= 1, but got 0"),
        ({0: 1, 5: 2.0}, "block sizes >= 1, but got 2.0"),
        ({0: 2, 5: 3}, "block sizes that divide the largest, 3, but got 2"),
    ],
)
def test_schedules_out_of_range_are_refused(value, message):
    with pytest.raises(ValueError, match=f"`block_size_schedule` .*{message}"):
        HierBD3LMTrainingArguments(output_dir="x", use_cpu=True, block_size_schedule=value)


@pytest.mark.parametrize(
    "setting",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"metric_for_best_model": "nll"},
    ],
)
def test_evaluations_at_different_block_sizes_are_not_compared(setting):
    with pytest.raises(ValueError, match="`metric_for_best_model` must be None with `block_size_schedule`"):
        HierBD3LMTrainingArguments(output_dir="x", use_cpu=True, block_size_schedule={0: 1, 1: 4}, **setting)


def test_fractions_are_steps_of_the_run():
    stages = resolve_schedule({0: 1, 0.29: 2, 60: 4}, max_steps=100)
    assert stages == [(0, 1), (29, 2), (60, 4)]
    assert [size_at(stages, step) for step in (0, 28, 29, 59, 60, 99)] == [1, 1, 2, 2, 4, 4]
    assert resolve_schedule({0: 1, 0.4: 2, 0.6: 4}, max_steps=1) == [(0, 4)]
    with pytest.raises(ValueError, match="must have starts below the run's 100 steps, but got 100"):
        resolve_schedule({0: 1, 100: 2}, max_steps=100)


# Batches


@pytest.mark.parametrize("fixed_length", [False, True])
@pytest.mark.parametrize("fields", [{}, {"algorithm": "bd3lm"}, {"hierarchical_mask": False}, {"plan_len": 0}])
def test_a_batch_is_laid_out_as_if_it_had_been_collated_for_the_smaller_blocks(fields, fixed_length):
    config = make_config(**fields)
    longest_plan = 7 if config.plan_len else 0
    rows = list(make_dataset(12, config, plan=(0, longest_plan), execution=(1, 20)))
    for row in rows[::3]:
        row["continues"] = True
        row["execution_ids"] = row["execution_ids"] + [config.end_token_id]  # of a document
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(rows)
    for size in (1, 2, 4):
        smaller = resized(config, size)
        expected = HierarchicalDataCollator(smaller, fixed_length=fixed_length)(rows)
        laid_out = lay_out_blocks(batch, BlockOrder.from_config(smaller), keep_columns=fixed_length)
        assert_bit_equal(laid_out, expected)
    assert (config.plan_block_size, config.execution_block_size) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}])
def test_no_batch_has_the_block_size_of_another_step(tmp_path, draws, workers, is_stream):
    dataset = make_dataset(12, make_config())
    if is_stream:
        workers = {"train_dataset": dataset.to_iterable_dataset(num_shards=2), "eval_dataset": dataset, **workers}
    trainer = make_trainer(tmp_path, num_examples=12, max_steps=7, block_size_schedule=GROWTH, **workers)
    trainer.train()
    assert [largest_block(record) for record in draws] == SIZES
    assert losses_of(trainer, "block_size")[:7] == SIZES


@pytest.mark.slow
def test_every_stage_trains_as_a_run_with_its_block_size(tmp_path, draws):
    settings = {"train_dataset": make_dataset(12, make_config()), "max_steps": 6, "lr_scheduler_type": "constant"}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    growing = make_trainer(tmp_path, seeded_model(), block_size_schedule={0: 1, 2: 2, 4: 4}, **settings)
    growing.train()
    masks = [record.draw.masked for record in draws]
    for size, first in ((1, 0), (2, 2), (4, 4)):
        folder = tmp_path / f"checkpoint-{first}"
        if first:  # as if the run had had this block size before
            config = json.loads((folder / "config.json").read_text())
            config |= {"plan_block_size": size, "execution_block_size": size}
            (folder / "config.json").write_text(json.dumps(config))
        draws.clear()
        alone = make_trainer(tmp_path / "alone", seeded_model(block_size=size), **settings)
        alone.train(resume_from_checkpoint=str(folder) if first else None)
        assert losses_of(alone)[first : first + 2] == losses_of(growing)[first : first + 2]
        for record, mask in zip(draws[:2], masks[first : first + 2], strict=True):
            assert torch.equal(record.draw.masked, mask)
        shutil.rmtree(tmp_path / "alone")


# Noise


def test_blocks_of_one_token_need_no_noisy_copies(tmp_path, draws):
    trainer = make_trainer(tmp_path, num_examples=8, block_size_schedule={0: 1, 1: 4}, noisy_copies=3)
    trainer.train()
    first, second = draws
    assert first.copies.masked.shape[1] == 1 and torch.equal(first.draw.masked, first.maskable)
    assert second.copies.masked.shape[1] == 3
    with pytest.raises(ValueError, match="`noisy_copies` must be 1 for an objective without noise, but got 3"):
        make_trainer(tmp_path, make_model(block_size=1), noisy_copies=3)


def test_every_block_size_has_clip_intervals_of_its_own(tmp_path, draws):
    settings = {"clip_search": [0.5], "clip_search_levels": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, num_examples=8, block_size_schedule=GROWTH, max_steps=7, **settings)
    clips = []
    compute_loss = trainer.compute_loss

    def recording(*args, **kwargs):
        clips.append(dict(trainer.clip_search.segment_intervals()))
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = recording
    trainer.train()
    searches = [entry["step"] for entry in trainer.state.log_history if "plan_clip_low" in entry]
    assert searches == [4, 6, 7]  # blocks of one token have no mask rates
    assert [bool(clip) for clip in clips] == [False] * 6 + [True]  # of step 4 were for blocks of two


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, draws, workers):
    settings = RUN | {"block_size_schedule": GROWTH, "dataloader_num_workers": workers, "noisy_copies": 2}
    whole = make_trainer(tmp_path, make_dropout_model(), **settings)
    whole.train()
    expected, masks = final_state(whole), [record.copies.masked for record in draws]
    for step, size in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 4)):
        folder = tmp_path / f"checkpoint-{step}"
        config = json.loads((folder / "config.json").read_text())
        assert (config["plan_block_size"], config["execution_block_size"]) == (size, size)
        draws.clear()
        torch.manual_seed(step)
        resumed = make_trainer(tmp_path / "resumed", make_dropout_model(), **settings)
        resumed.train(resume_from_checkpoint=str(folder))
        assert_bit_equal(final_state(resumed), expected)
        assert 0 < len(draws) < len(masks)
        for record, mask in zip(draws, masks[-len(draws) :], strict=True):
            assert torch.equal(record.copies.masked, mask)
        assert losses_of(resumed) == losses_of(whole)
        assert losses_of(resumed, "eval_nll") == losses_of(whole, "eval_nll")
    assert whole.model.config.plan_block_size == 4


def test_evaluations_and_checkpoints_have_the_block_size_in_force(tmp_path):
    settings = {"num_examples": 8, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, block_size_schedule={0: 1, 2: 4}, **settings)
    trainer.train()
    reported = losses_of(trainer, "eval_nll")
    for step, size in enumerate((1, 1, 4, 4), start=1):
        model = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert model.config.execution_block_size == model.order.parts[-1].block_size == size
        alone = make_trainer(tmp_path, model, train_dataset=trainer.train_dataset)
        assert alone.evaluate()["eval_nll"] == reported[step - 1]
    assert trainer.evaluate()["eval_nll"] == reported[-1]


def test_evaluation_at_the_start_of_a_resumed_run_has_the_block_size_of_the_checkpoint(tmp_path):
    settings = {"num_examples": 8, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "block_size_schedule": {0: 2, 1: 4, 2: 1}}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, eval_on_start=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, second = losses_of(whole, "eval_nll")
    assert losses_of(resumed, "eval_nll") == [first, first, second]


@pytest.mark.slow
def test_a_checkpoint_of_another_block_size_is_not_resumed_from(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings).train()
    folder = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="must have block size 4 before step 2, as the checkpoint has it, but got"):
        make_trainer(tmp_path, block_size_schedule={0: 1, 2: 4}, **settings).train(resume_from_checkpoint=folder)
    make_trainer(tmp_path, block_size_schedule={0: 4, 2: 2}, **settings).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match="execution_block_size: 4 stored, 2 now; plan_block_size: 4 stored, 2 now"):
        make_trainer(tmp_path, make_model(block_size=2), **settings).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"algorithm": "mdlm", "block_size": None}, "must be None for a model with one possible block size"),
        ({"joint": True, "block_size": None}, "must be None for a model with one possible block size"),
        ({"plan_len": 20}, "must have a largest block size that divides plan_len=20, but got 8"),
        ({"algorithm": "bd3lm", "plan_len": 20}, r"divides plan_len \+ execution_len=44, but got 8"),
    ],
)
def test_models_that_cannot_have_the_block_sizes_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(**fields), block_size_schedule={0: 1, 1: 8})


def test_weights_do_not_depend_on_the_block_size_that_the_model_had_before(tmp_path):
    runs = [seeded_model(block_size=size) for size in (2, 4)]
    for model in runs:
        dataset = make_dataset(8, make_config())
        make_trainer(tmp_path, model, train_dataset=dataset, block_size_schedule={0: 1, 1: 4}).train()
    assert_bit_equal(*map(weights_of, runs))


def test_blocks_of_one_token_of_a_shifted_model_train_as_an_autoregressive_model(tmp_path, draws):
    model = seeded_model(prediction="shifted", question_attention="causal")
    dataset, config, nats, count = make_dataset(8, make_config()), model.config, 0.0, 0
    for row in dataset:
        given = [*row["question_ids"], config.plan_token_id]
        plan = [*row["plan_ids"], config.end_token_id]
        execution = [*row["execution_ids"], config.end_token_id]
        tokens = torch.tensor([[*given, *plan, config.execution_token_id, *execution]])
        predicted = [
            *range(len(given), len(given) + len(plan)),
            *range(tokens.shape[1] - len(execution), tokens.shape[1]),
        ]
        with torch.no_grad():
            logits = model.backbone(tokens).logits[0]
        logits[:, config.mask_token_id] = -torch.inf
        log_p = logits.log_softmax(dim=-1)
        nats -= sum(log_p[place - 1, tokens[0, place]].item() for place in predicted)
        count += len(predicted)
    settings = {"train_dataset": dataset, "per_device_train_batch_size": 8, "max_steps": 3, "noisy_copies": 2}
    trainer = make_trainer(tmp_path, model, block_size_schedule={0: 1, 1: 4}, **settings)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(nats / count, rel=1e-5)
    assert [largest_block(record) for record in draws] == [4, 4]  # no mask is drawn for the first step
    assert not trainer.model.order.is_causal and trainer.model.config.prediction == "shifted"
