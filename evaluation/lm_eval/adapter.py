"""The model `hierbd3lm` of lm-evaluation-harness; `hierbd3lm lm-eval` registers it.

hierbd3lm lm-eval --model hierbd3lm --model_args pretrained=outputs/gsm8k_small --tasks gsm8k_hier --batch_size 32
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm.auto import tqdm
from transformers.utils import logging

from ...data.collator import check_content, encode_example
from ...data.decoding import decode
from ...diffusion_hierbd3lm import MAX_EXACT_BLOCK_SIZE, draw_mask, exact_nelbo
from ...generation_hierbd3lm import lay_out_plan, order_of, segment_limits
from ...masking_hierbd3lm import EXECUTION, PLAN, QUESTION
from ...settings_hierbd3lm import SETTINGS, HierBD3LMGenerationConfig, resolve_settings
from ..arguments import default_device
from ..checkpoints import load_model
from ..likelihood import with_predicted_tokens
from ..prompts import Prompt, encode_prompt, make_batches
from ..runner import Written, generate_batch
from .processes import device_of_process, gather, join_processes

logger = logging.get_logger(__name__)

LIKELIHOODS = ("monte_carlo", "exact")
LIKELIHOOD_PLANS = ("generated", "empty")
# not settable as model arguments: set by the task or by the type of request
OTHER_SETTINGS = ("stage", "temperature", "top_p", "seed")
GENERATION_SETTINGS = tuple(name for name in SETTINGS if name not in OTHER_SETTINGS)
UNANSWERED = ("num_too_long_questions", "num_questions_with_special_tokens")
NO_CHAT = "`apply_chat_template` must be False for hierbd3lm, which renders questions as in training, but got True"
GENERATION_KWARGS = ("until", "do_sample", "temperature", "top_p", "max_gen_toks")

Question = tuple[int, ...]


class Target(NamedTuple):
    """Content tokens of an execution whose likelihood is requested, and of its question."""

    question_ids: Question
    execution_ids: list[int]


@register_model("hierbd3lm")
class HierBD3LMHarnessModel(LM):
    """
    A checkpoint as a model of lm-evaluation-harness. The context of a request is used as the question, verbatim. A
    task that adds `Question:` or solved examples (such as the harness's own `gsm8k`) does not match the training data;
    `tasks/gsm8k_hier.yaml` gives the bare question.

    **`generate_until`** returns the execution up to the first stop string. The plan is generated first and not
    returned. Generation is greedy unless the task or `--gen_kwargs` sets a temperature. A question longer than
    `question_len` gets an empty answer, and is counted in the `config` of the results as `num_too_long_questions`; one
    whose text spells out a special token as `num_questions_with_special_tokens`. Requests answered from the harness's
    cache are not counted. Under `torchrun` the processes share the requests, each on its own GPU.

    **`loglikelihood`** returns minus the NELBO of the continuation as the whole execution, in nats: a lower bound on
    log p(execution | question, plan), unclipped and unweighted. It counts every token of the execution's blocks: the
    continuation as given (with the space that the harness puts before it, unless the task sets
    `target_delimiter: ""`), the `<|end|>` after it and those that fill its last block. A continuation of
    `execution_len - 1` tokens counts as truncated, without `<|end|>`. The plan is given and not counted: it is
    generated greedily from the question, or empty. It depends on the question alone, so that the continuations of one
    question are comparable.

    `is_greedy` is whether greedy generation, with the checkpoint's sampler, from the same question and plan gives
    exactly the continuation.

    **`loglikelihood_rolling`** returns the sum over a text that is cut into executions of `execution_len - 1` tokens.
    The question of the first is empty; that of each later one is the end of the text before it, up to `question_len`
    tokens.

    Args:
        pretrained: folder or id of a checkpoint, with its tokenizer.
        batch_size: questions per batch, and noisy copies of a target per forward pass.
        device: device such as `cpu` or `cuda:0`; defaults to a GPU if there is one. `cuda`, the harness's default,
            becomes `cpu` without CUDA, with a warning, as in the harness's own models.
        likelihood: `monte_carlo`, an unbiased estimate of the NELBO, or `exact`, by enumeration of the masks, for
            execution blocks of at most 8 tokens.
        num_draws: noise draws for `monte_carlo`, stratified over blocks and draws. The draws for a target depend only
            on `seed` and its length.
        likelihood_plan: `generated` or `empty`.
        seed: random seed of the noise, and of generation at a temperature.
        settings: generation settings among `GENERATION_SETTINGS`; default to those of the checkpoint.

    Raises:
        ValueError: for an unknown argument or a value out of range. When called: for generation keywords not in
            `GENERATION_KWARGS`, special tokens in a text, or a target that is too long.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        likelihood: str = "monte_carlo",
        num_draws: int = 32,
        likelihood_plan: str = "generated",
        seed: int = 0,
        **settings: Any,
    ):
        super().__init__()
        self.batch_size = _to_integer("batch_size", batch_size, low=1)
        self.num_draws, self.seed = _to_integer("num_draws", num_draws, low=1), _to_integer("seed", seed, low=0)
        _check_choice("likelihood", likelihood, LIKELIHOODS)
        _check_choice("likelihood_plan", likelihood_plan, LIKELIHOOD_PLANS)
        for name in settings:
            _check_choice("model_args", name, GENERATION_SETTINGS)
        self.likelihood, self.likelihood_plan = likelihood, likelihood_plan
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning(f"`device` is {device}, but there is no CUDA here: the model runs on the CPU.")
            device = None
        self._rank, self._world_size = join_processes()
        self._device = device_of_process(torch.device(device or default_device()), self._world_size)
        self.model, self.tokenizer = load_model(pretrained, str(self._device))
        self.config = self.model.config
        if likelihood == "exact" and self.config.execution_block_size > MAX_EXACT_BLOCK_SIZE:
            raise ValueError(
                f"`likelihood` must be monte_carlo for execution blocks of more than {MAX_EXACT_BLOCK_SIZE} tokens, "
                f"but got 'exact' for {self.config.execution_block_size}"
            )
        greedy = {"stage": "full", "temperature": 0.0, "top_p": 1.0}
        self.settings = resolve_settings(self.model.generation_config, settings | greedy)
        segment_limits(self.config, order_of(self.model, self.settings), self.settings)
        self.unanswered = dict.fromkeys(UNANSWERED, 0)  # of this process
        self.total_unanswered = self.unanswered

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries that the harness adds to the `config` of its results."""
        settings = {name: getattr(self.settings, name) for name in GENERATION_SETTINGS}
        info = {name: getattr(self, name) for name in ("likelihood", "num_draws", "likelihood_plan", "seed")}
        info |= {"model_num_parameters": self.model.num_parameters(), "generation_settings": settings}
        return info | self.total_unanswered

    # Several processes: the harness splits the requests and gathers the results

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a tensor from all processes, along the first dimension; one without dimensions as one element."""
        return torch.cat([torch.atleast_1d(part) for part in gather(tensor.cpu(), self.world_size)])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gather an object from all processes to `dst`; None in the others."""
        objects = gather(obj, self.world_size)
        return objects if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes, which the harness does after each type of requests, and add up their counts."""
        counts = gather(self.unanswered, self.world_size)
        self.total_unanswered = {name: sum(count[name] for count in counts) for name in UNANSWERED}

    # Chats: the models are not trained on them

    @property
    def tokenizer_name(self) -> str:
        raise ValueError(NO_CHAT)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise ValueError(NO_CHAT)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template:
            raise ValueError(NO_CHAT)
        return None

    # Requests of the harness

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate the execution of each request's question; see the class."""
        texts = [""] * len(requests)
        indices_of: dict[str, list[int]] = {}  # of the requests with the same keywords
        for index, request in enumerate(requests):
            indices_of.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for indices in indices_of.values():
                settings, until = self._read_keywords(requests[indices[0]].args[1])
                prompts = [self._prompt(index, requests[index].args[0]) for index in indices]
                progress.update(sum(not prompt.is_answered for prompt in prompts))
                # the harness repeats requests, also to give each process equally many
                self._count_unanswered(list({id(requests[prompt.index]): prompt for prompt in prompts}.values()))
                for prompt, written in self._generate(prompts, settings):
                    text = decode(written.execution_ids, self.tokenizer)
                    texts[prompt.index] = postprocess_generated_text(text, until, None)
                    request = requests[prompt.index]
                    self.cache_hook.add_partial("generate_until", request.args, texts[prompt.index])
                    progress.update()
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return minus the NELBO of each continuation, and whether greedy generation gives it; see the class."""
        targets = [self._read_pair(*request.args, self.config.chat_template) for request in requests]
        self._check_lengths(targets)
        plans = self._write_plans(targets)
        greedy = self._write_executions(plans)
        results = []
        values = tqdm(self._log_likelihoods(targets, plans), "Measuring", len(targets), disable=disable_tqdm)
        for request, target, value in zip(requests, targets, values, strict=True):
            results.append((value, greedy[target.question_ids] == target.execution_ids))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return minus the NELBO of each text, cut into executions; see the class."""
        windows = [self._read_text(*request.args) for request in requests]
        targets = [target for windows_of_text in windows for target in windows_of_text]
        self._check_lengths(targets)
        plans = self._write_plans(targets)
        values = iter(tqdm(self._log_likelihoods(targets, plans), "Measuring", len(targets), disable=disable_tqdm))
        results = []
        for request, windows_of_text in zip(requests, windows, strict=True):
            results.append(sum(next(values) for _ in windows_of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    # Requests

    def _prompt(self, index: int, question: str) -> Prompt:
        return encode_prompt(index, question, None, self.tokenizer, self.config)

    def _read_keywords(self, gen_kwargs: dict[str, Any]) -> tuple[HierBD3LMGenerationConfig, list[str]]:
        """Read settings and stop strings from `gen_kwargs`, as the harness's other models do."""
        block_size = self.config.execution_block_size
        most = segment_limits(self.config, order_of(self.model, self.settings), self.settings)[EXECUTION]
        keywords = normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=most)
        for name in keywords:
            _check_choice("gen_kwargs", name, GENERATION_KWARGS)
        allowed = (keywords["max_gen_toks"] + 1) // block_size * block_size  # the opener is not generated
        if allowed < 2:
            raise ValueError(
                f"`max_gen_toks` must be at least {max(block_size - 1, 1)}, the number of tokens of a block, but got "
                f"{keywords['max_gen_toks']}"
            )
        settings = {name: keywords[name] for name in ("temperature", "top_p") if name in keywords}
        return resolve_settings(self.settings, settings | {"max_execution_len": min(allowed, most)}), keywords["until"]

    def _count_unanswered(self, prompts: Sequence[Prompt]) -> None:
        too_long = sum(bool(prompt.too_long) for prompt in prompts)
        special = sum(prompt.has_special_token for prompt in prompts)
        limit = f"more than question_len={self.config.question_len} tokens"
        faults = limit, "a special token, such as <|plan|>, in their text"
        for name, count, fault in zip(UNANSWERED, (too_long, special), faults, strict=True):
            self.unanswered[name] += count
            if count:
                logger.warning(f"{count} of {len(prompts)} questions have {fault}: their answers are empty")

    def _read_pair(self, context: str, continuation: str, chat_template: bool) -> Target:
        example = {"question": context, "plan": None, "execution": continuation}
        ids = encode_example(example, self.tokenizer, chat_template=chat_template)
        check_content(ids, self.config)
        return Target(tuple(ids["question_ids"]), ids["execution_ids"])

    def _read_text(self, text: str) -> list[Target]:
        start, ids = self._read_pair("", text, chat_template=False)  # a question may begin with a BOS token
        room, length = self.config.question_len - len(start), self.config.execution_len - 1
        return [
            Target((*start, *ids[max(position - room, 0) : position]), ids[position : position + length])
            for position in range(0, max(len(ids), 1), length)
        ]

    def _check_lengths(self, targets: Sequence[Target]) -> None:
        limits = {"question": self.config.question_len, "execution": self.config.execution_len - 1}
        for segment, limit in limits.items():
            lengths = [len(getattr(target, f"{segment}_ids")) for target in targets]
            if max(lengths) > limit:
                raise ValueError(
                    f"`requests` must have at most {limit} tokens of {segment}, but "
                    f"{sum(length > limit for length in lengths)} of {len(lengths)} have more, up to {max(lengths)}"
                )

    # Generation

    def _generate(
        self, prompts: Sequence[Prompt], settings: HierBD3LMGenerationConfig
    ) -> Iterator[tuple[Prompt, Written]]:
        """Generate the answer to each prompt that is not too long, in the order of the batches."""
        seeds = random.Random(self.seed)
        for batch in make_batches(prompts, self.batch_size):
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            written = generate_batch(self.model, batch, batch_settings, tokenizer=self.tokenizer)
            yield from zip(batch, written, strict=True)

    def _write_plans(self, targets: Sequence[Target]) -> dict[Question, list[int]]:
        """Generate the plan of each question, unless plans are empty."""
        if self.likelihood_plan == "empty":
            return {target.question_ids: [] for target in targets}
        written = self._write({target.question_ids: None for target in targets}, stage="plan")
        return {question: content.plan_ids for question, content in written.items()}

    def _write_executions(self, plans: dict[Question, list[int]]) -> dict[Question, list[int]]:
        """Generate the greedy execution of each question with its plan, up to the model's maximum length."""
        written = self._write(plans, stage="execution", max_execution_len=None)
        return {question: content.execution_ids for question, content in written.items()}

    def _write(self, plans: dict[Question, list[int] | None], **settings: Any) -> dict[Question, Written]:
        questions = list(plans)
        prompts = [Prompt(index, list(question), plans[question], []) for index, question in enumerate(questions)]
        written = self._generate(prompts, resolve_settings(self.settings, settings))
        return {questions[prompt.index]: content for prompt, content in written}

    # Likelihood

    def _log_likelihoods(self, targets: Sequence[Target], plans: dict[Question, list[int]]) -> Iterator[float]:
        for target in targets:
            yield -self._nelbo(*self._lay_out(target, plans[target.question_ids]))

    def _lay_out(self, target: Target, plan_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay out question, plan and execution as generation does: token and segment ids of shape `(1, length)`."""
        config, block_size = self.config, self.config.execution_block_size
        question = torch.tensor([target.question_ids], dtype=torch.long)
        plan, _ = lay_out_plan(config, self.model.order, torch.tensor([plan_ids], dtype=torch.long))
        content = [config.execution_token_id, *target.execution_ids]
        length = min((len(content) + block_size) // block_size * block_size, config.execution_len)
        execution = torch.tensor([content + [config.end_token_id] * (length - len(content))])
        segments = [(question, QUESTION), (plan, PLAN), (execution, EXECUTION)]
        segment_ids = torch.cat([torch.full_like(ids, segment) for ids, segment in segments], dim=1)
        return torch.cat([question, plan, execution], dim=1), segment_ids

    @torch.no_grad()
    def _nelbo(self, input_ids: torch.LongTensor, segment_ids: torch.LongTensor) -> float:
        """Compute the NELBO of the execution of one row, of shape `(1, length)`, given question and plan, in nats."""
        row = with_predicted_tokens(self.model, {"input_ids": input_ids, "segment_ids": segment_ids})
        block_ids, maskable = row["block_ids"], row.pop("maskable") & (row.pop("segment_ids") == EXECUTION)

        def nll_of_masks(masked: torch.BoolTensor) -> torch.FloatTensor:
            rows = {name: ids.expand_as(masked).to(self.device) for name, ids in row.items()}
            return self.model.masked_nll(masked.to(self.device), **rows).cpu()

        if self.likelihood == "exact":
            return exact_nelbo(nll_of_masks, block_ids, maskable).sum().item()
        shape = self.num_draws, -1
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same draws on every device
        draw = draw_mask(block_ids.expand(shape), maskable.expand(shape), noise=self.config.noise, generator=generator)
        nats = 0.0
        for masked, weights in zip(*(x.split(self.batch_size) for x in (draw.masked, draw.weights)), strict=True):
            nats += (weights[masked].cpu().double() * nll_of_masks(masked).cpu().double()).sum().item()
        return nats / self.num_draws


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}")


def _to_integer(name: str, value: int | str, low: int) -> int:
    if not str(value).isdecimal() or int(value) < low:
        raise ValueError(f"`{name}` must be an integer >= {low}, but got {value!r}")
    return int(value)
