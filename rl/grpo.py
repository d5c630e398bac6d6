"""GRPO of a model that plans first: TRL's trainer with rollouts, log-probabilities and credit of block diffusion."""

import copy
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from ..data.arguments import parse_json
from ..data.collator import HierarchicalDataCollator
from ..data.decoding import decode
from ..evaluation.likelihood import with_predicted_tokens
from ..evaluation.prompts import Prompt, encode_prompt
from ..evaluation.runner import Written, generate_batch
from ..hub.card import write_card
from ..masking_hierbd3lm import EXECUTION, PLAN
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from ..training.objectives import make_objective
from .log_probs import token_log_probs, trajectory_log_probs
from .settings import SEQUENCE, TRAJECTORY, RolloutArguments

# setting of GRPOConfig that does not apply -> its only accepted value
FIXED = {
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "use_liger_kernel": False,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "multi_objective_aggregation": "sum_then_normalize",
}
SUMS_OF_TOKENS = ("dapo", "cispo", "vespo")  # loss types to which a completion without an advantage adds nothing
LEAST_SPREAD = 1e-4  # added to standard deviations, as in TRL


@dataclass
class HierBD3LMGRPOConfig(RolloutArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the settings of plans, executions and noise.

    `num_generations` is `num_plans * executions_per_plan`. The lengths of answers are those of the model's
    configuration, and `generation_kwargs` holds settings of [`HierBD3LMGenerationConfig`].
    """

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Save memory by computing activations again in the backward pass."}
    )

    def __post_init__(self):
        self.check_rollouts()
        if isinstance(self.generation_kwargs, str):
            self.generation_kwargs = parse_json("generation_kwargs", self.generation_kwargs)
        self.num_generations = self.num_plans * self.executions_per_plan
        super().__post_init__()
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {value!r} for block diffusion, but got {getattr(self, name)!r}")
        if self.num_generations_eval not in (None, self.num_generations):
            raise ValueError(
                f"`num_generations_eval` must be None or num_plans * executions_per_plan = {self.num_generations}, "
                f"but got {self.num_generations_eval}"
            )
        if self.push_to_hub:
            raise ValueError("`push_to_hub` must be False, but got True: `hierbd3lm push` pushes the trained model")
        per_process = self.per_device_train_batch_size * self.steps_per_generation
        if per_process % self.num_generations:
            raise ValueError(
                f"`per_device_train_batch_size` * `steps_per_generation` must be a multiple of "
                f"num_plans * executions_per_plan = {self.num_generations}, so that a process holds all samples of a "
                f"question, but got {per_process}"
            )


@dataclass
class LaidOutCompletions:
    """Completions as the model reads them.

    Args:
        batch: see [`~training.objectives`].
        index: row, place in the completion, and column in the batch of every scored token.
        seeds: of the noise of each row.
        steps: for each row, the forward pass that denoised each token of its completion.
    """

    batch: dict[str, torch.Tensor]
    index: tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]
    seeds: list[int]
    steps: list[list[int]]

    @property
    def reveal_steps(self) -> torch.LongTensor:
        """The forward pass that denoised each token of the batch, `(batch, length)`; see [`spread_steps`]."""
        return spread_steps(self.batch, self.index, self.steps)


class HierBD3LMGRPOTrainer(GRPOTrainer):
    """Train a [`HierBD3LMForBlockDiffusion`] with GRPO (Shao et al. 2024, "DeepSeekMath", section 4.1).

    For each question `num_plans` plans are sampled, and `executions_per_plan` executions of each. A completion is
    plan and execution with their special tokens. Reward functions have TRL's signature, and get the texts as
    `generated_plan` and `generated_execution` beside the columns of the dataset. The dataset has a column `prompt`
    with questions, as text.

    Policy, old policy and reference score a completion under the same noise. The logged `entropy` is the mean negative
    log-probability of the sampled tokens.

    Overridden methods of TRL's `GRPOTrainer`:

    - `__init__`: pass the rollouts as `rollout_func`, and copy the reference model instead of loading it again.
    - `_get_per_token_logps_and_entropies`: score tokens by [`token_log_probs`] or [`trajectory_log_probs`].
    - `_compute_loss`: leave out completions that do not move the policy.
    - `create_model_card`: write the card from the files of the run.
    - `_calculate_rewards`: keep the rewards for the advantages.
    - `_generate_and_score_completions`: give plan and execution their own advantages.

    Raises:
        ValueError: for a model without a plan, or with `execution_order="plan"`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: Callable | list[Callable],
        args: HierBD3LMGRPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        check_model(model)
        beta, args.beta = args.beta, 0.0  # with another value TRL loads the reference from a folder
        is_adapter = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        reference = copy.deepcopy(model).eval().requires_grad_(False) if beta and not is_adapter else None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            rollout_func=self._rollout,
            **kwargs,
        )
        self.beta = args.beta = beta
        self.eos_token_ids = [self._unwrapped().config.end_token_id]  # ends a completion that is not cut
        if reference is not None:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.objective = make_objective(self._unwrapped().config)
        self._collator = HierarchicalDataCollator(self._unwrapped().config)
        self._noise_key = 0
        self._trajectories: dict[tuple[int, ...], list[int]] = {}  # of the sampled rows
        self._rewards = torch.empty(0)

    def _unwrapped(self) -> PreTrainedModel:
        return without_adapter(self.accelerator.unwrap_model(self.model))

    def _rollout(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """Sample plans and executions; `prompts` holds each question once for each of its completions."""
        args, model, mode = self.args, self._unwrapped(), "train" if self.model.training else "eval"
        self._noise_key = self.state.global_step
        was_training = model.training
        model.eval()
        try:
            questions = self._encode(prompts, model)
            plans = self._write(model, "plan", questions, args.num_plans)
            repeated = [question for question in questions for _ in range(args.num_plans)]
            most = model.config.plan_len - 1  # of a plan that is given
            prompts_of_plans = [
                replace(question, plan_ids=plan.plan_ids[:most])
                for question, plan in zip(repeated, plans, strict=True)
            ]
            executions = self._write(model, "execution", prompts_of_plans, args.executions_per_plan)
        finally:
            model.train(was_training)
        repeated_plans = [plan for plan in plans for _ in range(args.executions_per_plan)]
        pairs = [*zip(repeated_plans, executions, strict=True)]
        passes = [plan.num_forward_passes + execution.num_forward_passes for plan, execution in pairs]
        self._metrics[mode]["nfe"].append(sum(passes) / len(passes))
        question_ids = [prompt.question_ids for prompt in repeated for _ in range(args.executions_per_plan)]
        completions, steps = zip(*(join(model.config, *pair) for pair in pairs), strict=True)
        if mode == "train":  # whose last samples have all been used
            self._trajectories.clear()
        self._trajectories |= {(*q, *c): of_row for q, c, of_row in zip(question_ids, completions, steps, strict=True)}
        texts = [(decode(p.plan_ids, self._tokenizer), decode(e.execution_ids, self._tokenizer)) for p, e in pairs]
        plan_texts, execution_texts = map(list, zip(*texts, strict=True))
        return {
            "prompt_ids": question_ids,
            "completion_ids": list(completions),
            "logprobs": None,
            "generated_plan": plan_texts,
            "generated_execution": execution_texts,
        }

    def _write(self, model: PreTrainedModel, stage: str, prompts: Sequence[Prompt], num_answers: int) -> list[Written]:
        """Sample so many plans, or executions, for each prompt."""
        settings = resolve_settings(self._generation_settings(model), {"stage": stage})
        return generate_batch(model, prompts, settings, tokenizer=self._tokenizer, num_answers=num_answers)

    def _generation_settings(self, model: PreTrainedModel) -> HierBD3LMGenerationConfig:
        key = f"{self.args.seed} {self.state.global_step} {self.accelerator.process_index}"
        settings = {"temperature": self.args.temperature, "top_p": self.args.top_p, "seed": zlib.crc32(key.encode())}
        return resolve_settings(model.generation_config, settings | (self.args.generation_kwargs or {}))

    def _encode(self, prompts: Sequence[str], model: PreTrainedModel) -> list[Prompt]:
        """Encode each question, which `prompts` holds `num_generations` times in a row, once.

        Raises:
            ValueError: for a question that the model does not accept, or that is there another number of times.
        """
        samples = self.args.num_generations
        questions = prompts[::samples]
        if [question for question in questions for _ in range(samples)] != prompts:
            raise ValueError(
                f"`per_device_eval_batch_size` must be a multiple of num_plans * executions_per_plan = {samples}, so "
                f"that a process holds all samples of a question, but got {self.args.per_device_eval_batch_size}"
            )
        encoded = [encode_prompt(0, question, None, self._tokenizer, model.config) for question in questions]
        for text, prompt in zip(questions, encoded, strict=True):
            if not prompt.is_answered:
                raise ValueError(
                    f"`prompt` must have at most question_len={model.config.question_len} tokens and spell out no "
                    f"special token, but got {text!r}"
                )
        return encoded

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return the log-probability of each token of the completions, `(batch, logits_to_keep)`; 0 for openers and
        for the last tokens of segments without `<|end|>`, which have no room for it."""
        log_probs = [
            self._score(model, ids, mask.bool(), logits_to_keep)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        log_probs = torch.cat(log_probs)
        return log_probs, -log_probs.detach() if compute_entropy else None, None

    def _score(
        self, model: Any, input_ids: torch.LongTensor, mask: torch.BoolTensor, num_completion: int
    ) -> torch.Tensor:
        args, given = self.args, self.lay_out(input_ids, mask, num_completion)
        with self.accelerator.autocast():
            if args.log_probs == TRAJECTORY and self.objective.has_noise:
                values = trajectory_log_probs(model, self.objective, given.batch, given.reveal_steps)
            else:
                noise = given.seeds, args.num_noise_draws, args.log_probs
                values = token_log_probs(model, self.objective, given.batch, *noise)
        rows, places, columns = given.index
        return values.new_zeros(len(input_ids), num_completion).index_put((rows, places), values[rows, columns])

    def lay_out(self, input_ids: torch.LongTensor, mask: torch.BoolTensor, num_completion: int) -> LaidOutCompletions:
        """Lay out questions and sampled completions for the model.

        Args:
            input_ids, mask: `(batch, length)`, as TRL pads them.
            num_completion: number of columns of the completions.
        """
        config = self._unwrapped().config
        features, places, seeds, steps = [], [], [], []
        for row, kept in zip(input_ids.tolist(), mask.tolist(), strict=True):
            real = [token for token, is_real in zip(row, kept, strict=True) if is_real]
            num_question = sum(kept[: len(row) - num_completion])
            feature, of_segments = split_completion(real[num_question:], config)
            features.append({"question_ids": real[:num_question]} | feature)
            places.append(of_segments)
            seeds.append(zlib.crc32(repr((self.args.seed, self._noise_key, real)).encode()))
            steps.append(self._trajectories[tuple(real)])
        batch = {name: ids.to(input_ids.device) for name, ids in self._collator(features).items()}
        batch = with_predicted_tokens(self._unwrapped(), batch)
        return LaidOutCompletions(batch, find_columns(batch, places), seeds, steps)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self.beta or self.args.loss_type not in SUMS_OF_TOKENS:
            return super()._compute_loss(model, inputs)
        advantages = inputs["advantages"]
        counts = (advantages != 0).view(len(advantages), -1).any(dim=1)
        counts[0] |= ~counts.any()  # every process takes part in the backward pass
        kept = {
            name: value[counts] if torch.is_tensor(value) and value.ndim else value for name, value in inputs.items()
        }
        return super()._compute_loss(model, kept)

    def create_model_card(self, model_name: str | None = None, **metadata: Any) -> None:
        """Write the model card from the saved files of the run, if there are any yet; see [`~hub.card.write_card`]."""
        folder = self.args.output_dir
        is_saved = any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json"))
        if self.is_world_process_zero() and is_saved:
            write_card(folder, state=dataclasses.asdict(self.state), **metadata)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)
        if self.args.credit == SEQUENCE:
            return output
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        rewards[self._rewards.isnan().all(dim=1)] = torch.nan
        plan, execution = segment_advantages(
            rewards, self.args.num_plans, self.args.executions_per_plan, self.scale_rewards
        )
        self._metrics[mode]["advantages/plan_abs"].append(plan.abs().mean().item())
        self._metrics[mode]["advantages/execution_abs"].append(execution.abs().mean().item())
        start = self.accelerator.process_index * len(inputs)
        plan, execution = (values[start : start + len(inputs), None] for values in (plan, execution))
        opener = output["completion_ids"] == self._unwrapped().config.execution_token_id
        output["advantages"] = torch.where(opener.cumsum(dim=1) > 0, execution, plan)
        return output


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(model: PreTrainedModel) -> None:
    """Raise a `ValueError` for a model whose answers have no plan, or steps that are denoised at the same time."""
    base = without_adapter(model)
    if PLAN not in base.order.segments:
        raise ValueError(f"`model` must write a plan, but got algorithm {base.config.algorithm!r} without one")
    if base.order.follows_plan:
        raise ValueError("`model` must have execution_order='chain', but got 'plan'")


def join(config: Any, plan: Written, execution: Written) -> tuple[list[int], list[int]]:
    """Return plan and execution with openers, and with `<|end|>` where the model wrote it; and the forward pass that
    denoised each token, 0 for openers."""
    ids, steps = [], []
    for opener, content, written in (
        (config.plan_token_id, plan.plan_ids, plan),
        (config.execution_token_id, execution.execution_ids, execution),
    ):
        ids += [opener, *content, *([config.end_token_id] if written.finished else [])]
        steps += [0, *written.reveal_steps]
    return ids, steps


def spread_steps(
    batch: dict[str, torch.Tensor], index: tuple[torch.Tensor, ...], steps: Sequence[list[int]]
) -> torch.LongTensor:
    """Return the forward pass that denoised each token of a batch, `(batch, length)`.

    Tokens that are not scored follow the token before them: those after an `<|end|>` are known once it is.

    Args:
        index: what [`find_columns`] returns.
        steps: for each row, those of its completion.
    """
    rows, places, columns = index
    values = torch.tensor([steps[row][place] for row, place in zip(rows.tolist(), places.tolist(), strict=True)])
    spread = torch.zeros_like(batch["input_ids"]).index_put((rows, columns), values.to(rows))
    known = torch.zeros_like(spread).index_put((rows, columns), columns).cummax(dim=1).values
    return spread.gather(1, known)


def split_completion(tokens: Sequence[int], config: Any) -> tuple[dict[str, list[int]], dict[int, list[int]]]:
    """Split a completion into the contents of plan and execution.

    Returns:
        `plan_ids` and `execution_ids`, cut where opener and `<|end|>` would not fit; and for each segment the places
        in the completion of its scored tokens, in order.
    """
    border = tokens.index(config.execution_token_id)
    feature, places = {}, {}
    for name, segment, start, stop, most in (
        ("plan_ids", PLAN, 1, border, config.plan_len - 2),
        ("execution_ids", EXECUTION, border + 1, len(tokens), config.execution_len - 2),
    ):
        has_end = stop > start and tokens[stop - 1] == config.end_token_id
        content = list(tokens[start : stop - has_end])[:most]
        feature[name] = content
        places[segment] = [*range(start, start + len(content)), *([stop - 1] if has_end else [])]
    return feature, places


def find_columns(
    batch: dict[str, torch.Tensor], places: Sequence[dict[int, list[int]]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, place in the completion, and column in the batch of every scored token."""
    counted, found = batch["labels"] != -100, []
    for row, of_segments in enumerate(places):
        for segment, of_tokens in of_segments.items():
            columns = (counted[row] & (batch["segment_ids"][row] == segment)).nonzero()[:, 0].tolist()
            found += [(row, place, column) for place, column in zip(of_tokens, columns, strict=False)]
    return tuple(torch.tensor(found, device=counted.device).view(-1, 3).T)


def segment_advantages(
    rewards: torch.Tensor, num_plans: int, executions_per_plan: int, scale: str = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the advantage of each completion's plan and of its execution.

    A plan's is its mean reward minus that of the other plans of the question, an execution's its reward minus the mean
    of the other executions of its plan: with `scale="none"` the policy gradient is unbiased (leave-one-out baseline,
    Kool et al. 2019). Both are in the same unit.

    Args:
        rewards: `(num_questions * num_plans * executions_per_plan,)`; NaN where nothing could be scored.
        scale: divide by the standard deviation of the rewards of the question (`group`), of all in the batch
            (`batch`), or not (`none`).

    Returns:
        two tensors of the shape of `rewards`; 0 where the reward is NaN.
    """
    of_executions = rewards.view(-1, num_plans, executions_per_plan)
    of_plans = of_executions.nanmean(dim=2, keepdim=True)
    plan, execution = minus_others(of_plans, 1).expand_as(of_executions), minus_others(of_executions, 2)
    if scale != "none":
        spread = nanstd(of_executions, dim=(0, 1, 2) if scale == "batch" else (1, 2), keepdim=True)
        plan, execution = plan / (spread + LEAST_SPREAD), execution / (spread + LEAST_SPREAD)
    return tuple(values.nan_to_num(nan=0.0).flatten() for values in (plan, execution))


def minus_others(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Subtract from each value the mean of the others along a dimension, NaN left out; 0 where there are none."""
    num_known = (~values.isnan()).sum(dim=dim, keepdim=True)
    difference = values - values.nanmean(dim=dim, keepdim=True)
    return difference * num_known / (num_known - 1).clamp(min=1)
