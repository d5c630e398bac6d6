"""The clip search selects the interval with the lowest loss variance, and training uses it."""

import json

import pytest
import torch

import hierbd3lm.training.objectives
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.diffusion_hierbd3lm import draw_mask
from hierbd3lm.evaluation.likelihood import per_segment, with_predicted_tokens
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments
from hierbd3lm.training.clip_search import (
    NUM_REPLICATES,
    BlockCosts,
    Candidates,
    ClipSearch,
    clipped_segments,
    draw_losses,
    measure_costs,
)
from hierbd3lm.training.objectives import make_objective

from .tiny import make_config, make_dataset, make_model
from .tiny_algorithms import ABLATIONS, ALGORITHMS

LENGTHS = {"question": (1, 5), "plan": (2, 6), "execution": (2, 9)}  # minimum and maximum number of tokens


def make_trainer(folder, model=None, **settings):
    if model is None:
        torch.manual_seed(0)
        model = make_model()
    dataset = make_dataset(12, model.config, **LENGTHS)
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 6, "logging_steps": 1}
    defaults |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "eval_noise_draws": 1}
    defaults |= {"clip_search": [0.5], "clip_search_levels": 4, "ema_decay": 0.5}
    return HierBD3LMTrainer(
        model,
        HierBD3LMTrainingArguments(output_dir=str(folder), **(defaults | settings)),
        train_dataset=settings.get("train_dataset", dataset),
        eval_dataset=dataset,
        data_collator=HierarchicalDataCollator(model.config),
    )


# Candidates


def test_candidates_are_all_intervals_of_the_widths_and_the_full_range():
    candidates = Candidates((0.5, 0.75), num_levels=4)
    expected = [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.75), (0.25, 1.0)]
    assert candidates.intervals == expected
    assert Candidates((1.0,), num_levels=4).intervals == [(0.0, 1.0)]
    assert len(Candidates((0.5,)).intervals) == 1 + 11


@pytest.mark.parametrize("width", [0.0, 1.5, -0.5, 0.3])
def test_widths_that_are_not_multiples_of_a_bin_are_refused(width):
    with pytest.raises(ValueError, match=r"`widths` must be multiples of 1 / 4 in \(0, 1\]"):
        Candidates((width,), num_levels=4)
    with pytest.raises(ValueError, match="`clip_search` must be"):
        HierBD3LMTrainingArguments(output_dir="x", use_cpu=True, clip_search=[width], clip_search_levels=4)


# Variance


def test_costs_are_the_losses_of_each_block_at_each_mask_rate():
    model = make_model()
    rows = list(make_dataset(3, model.config, **LENGTHS))
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(rows))
    value = torch.arange(batch["input_ids"].numel(), dtype=torch.float32).view(batch["input_ids"].shape)
    seen = []

    def token_nelbo(clip):
        assert torch.equal(clip[0, 0], clip[-1, -1])
        seen.append(clip[0, 0].tolist())
        return value * clip[..., 1]

    measured = measure_costs(token_nelbo, batch, batch["block_ids"], [(1,), (2,)], num_levels=4)
    assert seen == [[0.0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]
    expected, is_plan = [], []
    for row in range(3):
        for block in batch["block_ids"][row][batch["maskable"][row]].unique():
            inside = batch["maskable"][row] & (batch["block_ids"][row] == block)
            expected.append(value[row][inside].sum().item())
            is_plan.append((batch["segment_ids"][row][inside] == 1).all().item())
    assert measured.costs.shape == (4, len(expected))
    assert measured.costs[1].tolist() == [0.5 * cost for cost in expected]
    assert measured.groups[0].tolist() == is_plan and measured.groups[1].tolist() == [not plan for plan in is_plan]
    assert measured.num_tokens.tolist() == per_segment(batch["labels"] != -100, batch["segment_ids"]).sum(0).tolist()


def test_losses_of_a_single_block_are_its_costs_within_the_interval():
    costs = torch.tensor([[1.0], [2.0], [40.0], [80.0]], dtype=torch.float64)
    measured = BlockCosts(costs, torch.tensor([[True]]), torch.tensor([2]))
    candidates = Candidates((0.5,), num_levels=4)
    losses = draw_losses(measured, candidates, noisy_copies=1, generator=torch.Generator().manual_seed(0))
    assert losses.shape == (4, 1, NUM_REPLICATES)
    values = [set(row.unique().tolist()) for row in losses[:, 0]]
    assert values == [{0.5, 1.0, 20.0, 40.0}, {0.5, 1.0}, {1.0, 20.0}, {20.0, 40.0}]


def test_levels_of_many_blocks_are_spread_evenly_in_every_loss():
    """With twice as many equal blocks as levels, each level occurs equally often: the loss is constant."""
    costs = torch.tensor([1.0, 2.0, 40.0, 80.0], dtype=torch.float64)[:, None].expand(4, 8)
    measured = BlockCosts(costs, torch.ones(1, 8, dtype=torch.bool), torch.tensor([8]))
    losses = draw_losses(measured, Candidates((0.5,), num_levels=4), noisy_copies=1)
    torch.testing.assert_close(losses[:, 0], costs.new_tensor([30.75, 1.5, 21.0, 60.0])[:, None].expand(4, 64))


def test_copies_share_one_grid_and_their_loss_is_the_mean():
    costs = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    measured = BlockCosts(costs, torch.tensor([[True]]), torch.tensor([1]))
    losses = draw_losses(measured, Candidates((1.0,), num_levels=2), noisy_copies=2)
    assert set(losses.flatten().tolist()) == {2.0}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["stratified", "bernoulli"])
def test_variance_agrees_with_that_of_drawn_losses(estimator):
    """Compare the simulated variance with that of 20 noise draws for each of 10 batches."""
    model = make_model()
    rows = list(make_dataset(40, model.config, **LENGTHS))
    objective, segments = make_objective(model.config, estimator), list(clipped_segments(model.config).values())
    candidates, predicted, drawn = Candidates((0.5,), num_levels=20), [], {}
    generator = torch.Generator().manual_seed(0)
    chosen = [0, candidates.intervals.index((0.45, 0.95))]
    with torch.no_grad():
        for start in range(0, 40, 4):
            batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(rows[start : start + 4]))

            def token_nelbo(clip, batch=batch):
                return objective.token_nelbo(model, batch, generator, clip=clip)

            measured = measure_costs(token_nelbo, batch, batch["block_ids"], segments, 20)
            predicted.append(draw_losses(measured, candidates, 1, generator).var(dim=2))
            for number in chosen:
                clip = torch.tensor(candidates.intervals[number]).expand(*batch["input_ids"].shape, 2)
                nats = [per_segment(token_nelbo(clip), batch["segment_ids"]).sum(dim=0) for _ in range(20)]
                drawn.setdefault(number, []).append((torch.stack(nats) / measured.num_tokens).var(dim=0))
    variance = torch.stack(predicted).mean(dim=0)
    for number in chosen:
        ratio = variance[number] / torch.stack(drawn[number]).mean(dim=0)
        if number or estimator == "stratified":  # the weight 1 / t near t = 0 has too heavy a tail to compare
            assert (ratio > 0.6).all() and (ratio < 1.6).all(), ratio
    assert (variance[chosen[1]] < 0.6 * variance[0]).all()


# Selection


def test_the_interval_with_the_lowest_variance_is_selected_for_each_group():
    search = ClipSearch([0.5], num_levels=4)
    variance = torch.tensor([[1.0, 0.1], [3.0, 2.0], [2.0, 5.0], [4.0, 3.0]], dtype=torch.float64)
    logs = search.choose(["plan", "execution"], variance)
    assert (logs["plan_clip_low"], logs["plan_clip_high"]) == (0.25, 0.75)
    assert (logs["plan_clip_variance"], logs["plan_clip_variance_unclipped"]) == (2.0, 1.0)
    assert search.segment_intervals() == {"plan": [0.25, 0.75], "execution": [0.0, 0.5]}
    whole = ClipSearch([0.5, 1.0], num_levels=4)  # [0, 1] may be selected if its width is a candidate
    whole.choose(["plan", "execution"], variance)
    assert whole.chosen == {"plan": [0.0, 1.0], "execution": [0.0, 1.0]}


def test_blocks_of_both_segments_have_one_interval():
    for fields in (ALGORITHMS["bd3lm"], ABLATIONS["block by block, without"]):
        config = make_config(**fields)
        assert clipped_segments(config) == {"all": (1, 2)}
        search = ClipSearch([0.5], num_levels=4)
        search.choose(["all"], torch.tensor([[1.0], [3.0], [2.0], [4.0]]))
        assert search.segment_intervals() == {"plan": [0.25, 0.75], "execution": [0.25, 0.75]}
    assert clipped_segments(make_config()) == {"plan": (1,), "execution": (2,)}


# Training


@pytest.fixture
def clips(monkeypatch):
    """Record the clip intervals of the first and the last maskable token in each noise draw."""
    record = []

    def recording(block_ids, maskable, clip, *args):
        if clip is not None:
            record.append((clip[maskable][0].tolist(), clip[maskable][-1].tolist()))
        return draw_mask(block_ids, maskable, clip, *args)

    monkeypatch.setattr(hierbd3lm.training.objectives, "draw_mask", recording)
    return record


def searches_of(trainer):
    return [entry for entry in trainer.state.log_history if "plan_clip_low" in entry]


def test_every_evaluation_in_training_selects_the_intervals_of_the_next_steps(tmp_path, clips):
    trainer = make_trainer(tmp_path)
    trainer.train()
    searches = searches_of(trainer)
    assert [entry["step"] for entry in searches] == [2, 4, 6]
    steps = [pair for pair in clips if pair[0][1] - pair[0][0] >= 0.5]  # the bins of a search have width 0.25
    assert len(steps) == 6 and len(clips) == 6 + 3 * 4 * 3  # 3 searches of 4 levels over 3 batches
    assert steps[0] == steps[1] == ([0.0, 1.0], [0.0, 1.0])
    for number, entry in enumerate(searches[:2]):
        chosen = tuple([entry[f"{name}_clip_low"], entry[f"{name}_clip_high"]] for name in ("plan", "execution"))
        assert steps[2 + 2 * number] == steps[3 + 2 * number] == chosen
        assert chosen[0][1] - chosen[0][0] == 0.5
    last = searches[-1]
    assert trainer.clip_search.chosen["plan"] == [last["plan_clip_low"], last["plan_clip_high"]]


@pytest.mark.slow
def test_the_reported_likelihood_is_not_changed_by_a_search(tmp_path, clips):
    settings = {"learning_rate": 0.0}
    searching = make_trainer(tmp_path / "a", **settings)
    searching.train()
    plain = make_trainer(tmp_path / "b", clip_search=None, **settings)
    plain.train()
    values = [[e["eval_nll"] for e in t.state.log_history if "eval_nll" in e] for t in (searching, plain)]
    assert values[0] == values[1] and len(values[0]) == 3
    assert plain.clip_search is None


def test_an_evaluation_outside_of_training_selects_no_interval(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.evaluate()
    assert not trainer.clip_search.chosen and not searches_of(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_uses_the_selected_intervals(tmp_path, restore):
    settings = {"restore_callback_states_from_checkpoint": restore}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    expected = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ClipSearch"]["attributes"]
    assert saved["chosen"]["plan"] == [searches_of(whole)[0]["plan_clip_low"], searches_of(whole)[0]["plan_clip_high"]]
    assert len(saved["variances"]["execution"]) == 4
    resumed = make_trainer(tmp_path, **settings)
    assert not resumed.clip_search.chosen
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(expected[name], parameter) for name, parameter in resumed.model.named_parameters())
    assert searches_of(resumed) == searches_of(whole)
    assert resumed.clip_search.state() == whole.clip_search.state()


def test_a_search_does_not_change_the_configuration(tmp_path, clips):
    """Before the first search, training uses the intervals of the configuration."""
    model = make_model(plan_clip=[0.3, 0.9], execution_clip=[0.2, 1.0])
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    torch.testing.assert_close(torch.tensor(clips[0]), torch.tensor([[0.3, 0.9], [0.2, 1.0]]))
    for folder in ("checkpoint-3", "checkpoint-6"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["plan_clip"], config["execution_clip"]) == ([0.3, 0.9], [0.2, 1.0])
    assert trainer.model.config.plan_clip == [0.3, 0.9] != trainer.clip_search.chosen["plan"]


def test_a_search_starts_from_a_checkpoint_that_had_none(tmp_path):
    make_trainer(tmp_path, clip_search=None, max_steps=2).train()
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in searches_of(trainer)] == [4, 6]


def test_a_search_without_noise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`clip_search` must be None for an objective without noise"):
        make_trainer(tmp_path, make_model(**ALGORITHMS["ar"]))


@pytest.mark.slow
def test_a_search_uses_the_first_of_several_datasets(tmp_path):
    whole, several = make_trainer(tmp_path / "a", max_steps=2), make_trainer(tmp_path / "b", max_steps=2)
    several.eval_dataset = {"one": several.eval_dataset, "two": several.eval_dataset.select(range(2))}
    whole.train()
    several.train()
    searches = [{k: v for k, v in searches_of(t)[0].items() if "clip" in k} for t in (whole, several)]
    assert searches[0] == searches[1]
