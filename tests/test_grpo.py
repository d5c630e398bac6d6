"""GRPO: log-probabilities against enumeration, advantages of plan and execution, and the trainer."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import GRPOTrainer

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.evaluation.likelihood import with_predicted_tokens
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.rl import command, rewards
from hierbd3lm.rl.grpo import (
    HierBD3LMGRPOConfig,
    HierBD3LMGRPOTrainer,
    find_columns,
    segment_advantages,
    split_completion,
    spread_steps,
)
from hierbd3lm.rl.log_probs import complementary_masks, token_log_probs, trajectory_log_probs, trajectory_masks
from hierbd3lm.training.objectives import make_objective
from hierbd3lm.training.recipes import GRPO_FOLDER, recipe_names

from .reference_generation import denoise
from .tiny import make_config, make_model
from .tiny_generation import speaker
from .tiny_tokenizer import make_config_for, make_tokenizer

EXAMPLES = [
    {"question_ids": [7, 8, 9], "plan_ids": [10, 11, 12, 13, 14], "execution_ids": [20, 21, 22]},
    {"question_ids": [7], "plan_ids": [15], "execution_ids": [23, 24, 25, 26, 27, 28, 29, 30, 31]},
]


def batch_of(model, examples=EXAMPLES):
    return with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))


# Log-probabilities


def test_a_pair_of_masks_covers_every_predicted_token_once():
    batch = batch_of(make_model())
    masked, weights = complementary_masks(batch["block_ids"], batch["maskable"], [1, 2], num_draws=3)
    assert masked.shape == (2, 6, batch["block_ids"].shape[1])
    pairs = masked[:, :3].int() + masked[:, 3:].int()
    assert torch.equal(pairs.bool(), batch["maskable"][:, None].expand_as(pairs)) and pairs.max() == 1
    assert torch.equal(weights > 0, masked)


def test_masks_depend_on_a_row_and_its_seed_and_not_on_the_rows_beside_it():
    model = make_model()
    both, alone = batch_of(model), batch_of(model, EXAMPLES[1:])
    masked, _ = complementary_masks(both["block_ids"], both["maskable"], [1, 2], 2)
    alone_masked, _ = complementary_masks(alone["block_ids"], alone["maskable"], [2], 2)
    other, _ = complementary_masks(alone["block_ids"], alone["maskable"], [3], 2)
    assert torch.equal(masked[1][:, both["maskable"][1]], alone_masked[0][:, alone["maskable"][0]])
    assert not torch.equal(other, alone_masked)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [2, 4, 8])
@torch.no_grad()
def test_log_probabilities_are_within_two_percent_of_the_enumeration(block_size):
    model = make_model(block_size=block_size)
    batch, objective = batch_of(model), make_objective(model.config)
    exact = objective.exact(model, batch).sum(dim=1)
    draws = [token_log_probs(model, objective, batch, [2 * i, 2 * i + 1], num_draws=25) for i in range(24)]
    estimate = -torch.stack(draws).mean(dim=0).sum(dim=1)
    torch.testing.assert_close(estimate.double(), exact.double(), rtol=0.02, atol=0)


@torch.no_grad()
def test_uniform_weights_are_the_mean_loss_of_a_token_over_all_sizes_of_its_mask():
    model = make_model(block_size=2)
    batch, objective = batch_of(model), make_objective(model.config)
    draws = [token_log_probs(model, objective, batch, [2 * i, 2 * i + 1], 25, "uniform") for i in range(16)]
    block = batch["block_ids"] == 1  # of a pair, both tokens are masked in 2 of 3 cases
    columns = block[0].nonzero()[:, 0].tolist()
    together = objective.token_losses(model, batch, block & batch["maskable"])
    predicted = batch["maskable"][0, columns].tolist()
    assert predicted == [False, True]  # the opener is given, so that the block has one token to predict
    torch.testing.assert_close(-torch.stack(draws).mean(dim=0)[0, columns[1]], together[0])


@torch.no_grad()
def test_blocks_of_one_token_are_scored_exactly():
    model = make_model(block_size=1, prediction="shifted", question_attention="causal")
    batch = batch_of(model, EXAMPLES[:1])
    values = token_log_probs(model, make_objective(model.config), batch, [0])
    logits = model.backbone(input_ids=batch["input_ids"]).logits.log_softmax(dim=-1)
    for column in batch["maskable"][0].nonzero()[:, 0].tolist():
        token = int(batch["input_ids"][0, column])
        allowed = logits[0, column - 1].clone()
        allowed[model.config.mask_token_id] = -math.inf  # which the model never predicts
        expected = allowed.log_softmax(dim=-1)[token]
        torch.testing.assert_close(values[0, column], expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_scored_with_what_it_and_later_steps_denoised_masked():
    blocks = torch.tensor([[0, 1, 1, 1, 1, 2, 2]])
    maskable = torch.tensor([[False, True, True, True, True, False, True]])
    masked, scored = trajectory_masks(blocks, maskable, torch.tensor([[0, 3, 5, 3, 4, 0, 9]]))
    assert masked[0].int().tolist() == [[0, 1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]
    assert scored[0].int().tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]


def test_log_probabilities_of_a_trajectory_are_those_of_its_generation():
    model, num_compared = speaker(), 0
    settings = {"tokens_per_step": 2, "left_to_right": True, "temperature": 1.0}
    for seed in range(12):
        answer = denoise(model, [7, 8, 9], seed=seed, **settings)
        if not answer.finished:
            continue
        example = {"question_ids": [7, 8, 9], "plan_ids": answer.plan, "execution_ids": answer.execution}
        batch = batch_of(model, [example])
        num_plan, num_all = len(answer.plan) + 1, len(answer.log_probs)
        index = find_columns(batch, [{1: [*range(num_plan)], 2: [*range(num_plan, num_all)]}])
        steps = spread_steps(batch, index, [answer.reveal_steps])
        with torch.no_grad():
            values = trajectory_log_probs(model, make_objective(model.config), batch, steps)
        expected = torch.tensor(answer.log_probs, dtype=values.dtype)
        torch.testing.assert_close(values[0, index[2]], expected, rtol=1e-5, atol=1e-6)
        num_compared += len(set(answer.reveal_steps)) < num_all  # some tokens were denoised together
    assert num_compared >= 3


# Completions


def test_the_scored_tokens_of_a_completion_are_those_of_the_batch():
    config = make_config(plan_len=8)
    plan, end, execution = config.plan_token_id, config.end_token_id, config.execution_token_id
    completions = [[plan, 10, 11, end, execution, 20, end], [plan, *range(10, 18), execution, 21, 22, end]]
    features, places = zip(*(split_completion(tokens, config) for tokens in completions), strict=True)
    assert features[1] == {"plan_ids": [10, 11, 12, 13, 14, 15], "execution_ids": [21, 22]}  # cut to fit
    batch = HierarchicalDataCollator(config)([{"question_ids": [7]} | feature for feature in features])
    rows, of_completion, columns = find_columns(batch, places)
    for row, place, column in zip(rows.tolist(), of_completion.tolist(), columns.tolist(), strict=True):
        assert completions[row][place] == int(batch["input_ids"][row, column])
    assert [(rows == row).sum().item() for row in (0, 1)] == [5, 9]


# Advantages


def test_a_plan_is_compared_with_plans_and_an_execution_with_those_of_its_plan():
    of_question = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])  # three plans, two executions of each
    plan, execution = segment_advantages(of_question, 3, 2, "none")
    assert plan.tolist() == pytest.approx([0.75, 0.75, 0, 0, -0.75, -0.75])
    assert execution.tolist() == pytest.approx([0, 0, -1, 1, 0, 0])
    unit = of_question.std() + 1e-4  # of plans and executions
    scaled = segment_advantages(of_question, 3, 2, "group")
    torch.testing.assert_close(scaled, (plan / unit, execution / unit))
    two = torch.cat([of_question, torch.zeros(6)])
    scaled = segment_advantages(two, 3, 2, "batch")
    unit = two.std() + 1e-4
    torch.testing.assert_close(scaled, tuple(torch.cat([of, torch.zeros(6)]) / unit for of in (plan, execution)))


def test_separate_credit_is_an_unbiased_policy_gradient():
    """All samples of two plans and two executions of each, of a policy with one bit for a plan and one after it."""
    logits = torch.tensor(
        [0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True
    )  # plan; execution after 0, after 1
    rewards_of = torch.tensor([[0.2, 0.9], [1.0, 0.1]])

    def log_prob(place, bit):
        return torch.nn.functional.logsigmoid(logits[place] if bit else -logits[place])

    bits = (0, 1)
    value = sum(
        (log_prob(0, plan) + log_prob(1 + plan, execution)).exp() * rewards_of[plan, execution]
        for plan in bits
        for execution in bits
    )
    gradient = torch.zeros(3, dtype=torch.float64)
    for plans in itertools.product(bits, repeat=2):
        for executions in itertools.product(bits, repeat=4):
            samples = [*zip((plans[0], plans[0], plans[1], plans[1]), executions, strict=True)]
            rewards = torch.tensor([rewards_of[sample] for sample in samples])
            of_plan, of_execution = segment_advantages(rewards, 2, 2, "none")
            of_both = [(log_prob(0, plan), log_prob(1 + plan, execution)) for plan, execution in samples]
            gain = sum(
                (of_plan[row] * plan + of_execution[row] * execution) / 4
                for row, (plan, execution) in enumerate(of_both)
            )
            chance = (sum(log_prob(0, plan) for plan in plans) + sum(pair[1] for pair in of_both)).exp().item()
            gradient += chance * torch.autograd.grad(gain, logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(value, logits)[0], atol=1e-6, rtol=1e-5)


def test_what_cannot_be_scored_has_no_advantage():
    plan, execution = segment_advantages(torch.tensor([1.0, math.nan, 0.0, 0.0]), 2, 2, "none")
    assert plan.tolist() == [1, 1, -1, -1] and execution.tolist() == [0, 0, 0, 0]


# Rewards


def test_rewards_score_texts():
    assert rewards.exact_match(["a = 3\n#### 3", "#### 4"], ["3", "3"]) == [1, 0]
    assert rewards.plan_format(["[1] add\n[2] halve", "", "[1] add\n[1] add"]) == [1, 0, 0]
    assert rewards.arithmetic(["2 + 2 = <<2+2=4>>4", "2 + 2 = <<2+2=5>>5"]) == [1, 0]
    assert rewards.brevity([[1] * 50]) == [-0.5]


# The trainer


def make_trainer(folder, model=None, reward=None, **settings):
    tokenizer = make_tokenizer()
    if model is None:
        model = tiny_model(tokenizer)
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_plans": 2,
        "executions_per_plan": 2,
        "per_device_train_batch_size": 8,
        "generation_kwargs": {"sampler": "first_hitting", "max_plan_len": 8, "max_execution_len": 8},
    }
    return HierBD3LMGRPOTrainer(
        model,
        rewards.brevity if reward is None else reward,
        HierBD3LMGRPOConfig(output_dir=str(folder), **(defaults | settings)),
        Dataset.from_dict({"prompt": ["2 and 3?", "4 and 5?", "6?", "7 and 1?"], "answer": ["5", "9", "6", "8"]}),
        tokenizer,
    )


def tiny_model(tokenizer):
    config = make_config_for(tokenizer, plan_len=8, execution_len=8)
    torch.manual_seed(0)
    return HierBD3LMForBlockDiffusion._from_config(config).eval()


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def test_policy_and_reference_see_the_same_noise(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0 < kl[1] and math.isfinite(kl[1])  # equal until the first update
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    assert all(nfe >= 2 for nfe in logged(trainer, "nfe"))


def test_completions_that_end_are_told_from_those_that_are_cut(tmp_path):
    trainer, ends = make_trainer(tmp_path), []
    sample = trainer.rollout_func
    trainer.rollout_func = lambda *args: ends.append(sample(*args)) or ends[-1]
    trainer.model.train()
    trainer._generate_and_score_completions([{"prompt": "2 and 3?"}] * 40)
    end = trainer.model.config.end_token_id
    cut = [ids[-1] != end for ids in ends[0]["completion_ids"]]
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(sum(cut) / len(cut))]
    assert 0 < sum(cut) < len(cut)


def test_rewards_see_both_texts_and_the_columns_of_the_dataset(tmp_path):
    seen = []

    def reward(prompts, completions, generated_plan, generated_execution, answer, **columns):
        seen.append((prompts, completions, generated_plan, generated_execution, answer))
        return [float(len(text)) for text in generated_execution]

    make_trainer(tmp_path, reward=reward, max_steps=1).train()
    prompts, completions, plans, executions, answers = seen[0]
    assert prompts[:4] == prompts[:1] * 4 and answers[:4] == answers[:1] * 4
    assert plans[0] == plans[1] and plans[2] == plans[3]  # of one plan two executions
    assert completions == [plan + execution for plan, execution in zip(plans, executions, strict=True)]


def test_advantages_are_those_of_the_segment_of_each_token(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda completions, **columns: [*map(float, range(len(completions)))])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "2 and 3?"}] * 4)
    opener, unit = trainer.model.config.execution_token_id, torch.arange(4.0).std()  # plans have means of 0.5 and 2.5
    for row, of_plan, of_execution in zip(range(4), (-2, -2, 2, 2), (-1, 1, -1, 1), strict=True):
        place = batch["completion_ids"][row].tolist().index(opener)
        advantages = batch["advantages"][row]
        assert torch.allclose(advantages[:place], of_plan / unit, atol=1e-3)
        assert torch.allclose(advantages[place:], of_execution / unit, atol=1e-3)


def test_the_old_policy_is_the_policy_before_the_first_update(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_generation=2, per_device_train_batch_size=4, num_iterations=2)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    batch = trainer._buffered_inputs[0]
    assert "old_per_token_logps" in batch


def test_completions_without_an_advantage_are_left_out_and_change_no_gradient(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda completions, **columns: [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "2 and 3?"}] * 4 + [{"prompt": "6?"}] * 4)
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets
    rows, score = [], trainer._score

    def watched(model, input_ids, *args):
        rows.append(len(input_ids))
        return score(model, input_ids, *args)

    trainer._score = watched
    losses = [trainer.compute_loss(trainer.model, batch), GRPOTrainer._compute_loss(trainer, trainer.model, batch)]
    assert rows == [4, 8]
    weights = [*trainer.model.parameters()]
    kept, whole = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in losses)
    assert whole.abs().amax() > 0
    torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_blocks_are_trained_along_their_trajectories(tmp_path):
    settings = {"log_probs": "trajectory", "beta": 0.1, "num_iterations": 2}
    trainer = make_trainer(tmp_path, max_steps=4, **settings)
    assert trainer.objective.has_noise
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0 < kl[1] and all(map(math.isfinite, kl))


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["segment", "sequence"])
def test_a_reward_grows(tmp_path, credit):
    def reward(generated_plan, generated_execution, **columns):
        pairs = zip(generated_plan, generated_execution, strict=True)
        return [float("a" in plan) + float("b" in text) for plan, text in pairs]

    trainer = make_trainer(
        tmp_path, reward=reward, credit=credit, max_steps=40, num_plans=4, executions_per_plan=4,
        per_device_train_batch_size=32,
    )  # fmt: skip
    trainer.train()
    means = logged(trainer, "reward")
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_plans": 1}, "`num_plans` and `executions_per_plan` must be >= 2 with credit='segment'"),
        ({"credit": "token"}, "`credit` must be one of segment, sequence, but got 'token'"),
        ({"per_device_train_batch_size": 6}, "must be divisible by num_generations"),
        ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile` must be 1.0 for block diffusion, but got 0.5"),
        ({"push_to_hub": True}, "`push_to_hub` must be False, but got True: `hierbd3lm push`"),
        ({"top_k": 5}, "`top_k` must be 0 for block diffusion, but got 5"),
        ({"num_generations_eval": 2}, "`num_generations_eval` must be None or num_plans"),
        ({"num_noise_draws": 2, "log_probs": "trajectory"}, "`num_noise_draws` must be 1 with log_probs='trajectory'"),
        ({"num_noise_draws": 0}, "`num_noise_draws` must be at least 1, but got 0"),
        ({"log_probs": "one"}, "`log_probs` must be one of bound, uniform, trajectory, but got 'one'"),
    ],
)
def test_settings_out_of_their_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_a_model_without_a_plan_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer, plan_len=0)
    with pytest.raises(ValueError, match="`model` must write a plan"):
        make_trainer(tmp_path, model=HierBD3LMForBlockDiffusion._from_config(config))


def test_a_question_that_does_not_fit_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="`prompt` must have at most question_len=16 tokens"):
        trainer._rollout(["x" * 17] * 4, trainer)


def test_samples_of_a_question_that_are_spread_over_batches_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="`per_device_eval_batch_size` must be a multiple of"):
        trainer._rollout(["1 and 2?"] * 3 + ["2 and 3?"] * 3, trainer)


# The command


def command_line(checkpoint, folder, *others):
    settings = {"init_from": checkpoint, "output_dir": folder, "num_train_examples": 8, "num_plans": 2}
    settings |= {"executions_per_plan": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
    settings |= {"report_to": "none", "max_steps": 4, "save_steps": 2, "logging_steps": 1, "beta": 0.1}
    settings |= {"learning_rate": 1e-3, "disable_tqdm": True, "warmup_steps": 0}
    return [*(str(word) for name, value in settings.items() for word in (f"--{name}", value)), *others]


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_weights(checkpoint, tmp_path, capsys):
    command.main(command_line(checkpoint, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    command.main(command_line(checkpoint, tmp_path / "resumed", "--resume_from_checkpoint", "last"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "8 problems; dropped, as the model does not accept the question: 0" in capsys.readouterr().out
    HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "GRPO" in card and str(tmp_path) not in card and str(checkpoint) not in card


@pytest.mark.slow
def test_an_adapter_is_trained_against_its_base(checkpoint, tmp_path):
    command.main(command_line(checkpoint, tmp_path, "--use_peft", "true", "--max_steps", "2"))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    kl = [line["kl"] for line in log if "kl" in line]
    assert kl[0] == 0 and math.isfinite(kl[1])
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_checkpoint_is_trained_in_blocks_of_one(checkpoint, tmp_path):
    command.main(command_line(checkpoint, tmp_path, "--block_size", "1", "--max_steps", "1"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["plan_block_size"] == config["execution_block_size"] == 1


@pytest.mark.slow
def test_two_processes_train_one_model(checkpoint, tmp_path):
    words = command_line(checkpoint, tmp_path, "--per_device_train_batch_size", "4", "--max_steps", "2")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hierbd3lm.rl.command", *words]
    subprocess.run([sys.executable, *launch], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [math.isfinite(line["reward"]) for line in log if "reward" in line] == [True, True]
    assert all(line["kl"] == 0 for line in log[:1])


def test_rewards_are_found_by_name():
    assert command.find_reward("exact_match") is rewards.exact_match
    assert command.find_reward("hierbd3lm.rl.rewards:brevity") is rewards.brevity
    with pytest.raises(ValueError, match=r"must be among exact_match, .+, but got 'exact'"):
        command.find_reward("exact")
    with pytest.raises(ValueError, match="`rewards` must name functions that can be imported"):
        command.find_reward("json:nothing")


@pytest.mark.parametrize("name", recipe_names(GRPO_FOLDER))
def test_recipes_are_read(name):
    policy, _, args = command.parse_arguments([name, "--use_cpu", "true"])
    assert [command.find_reward(reward) for reward in policy.rewards]
    assert args.num_generations == args.num_plans * args.executions_per_plan
    assert command.parse_arguments([name, "--use_cpu", "true", "--block_size", "null"])[0].block_size is None
