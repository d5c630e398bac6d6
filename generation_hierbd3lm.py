"""Generation: `generate()`, which checks its arguments, has the answer denoised and gathers it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .denoising_hierbd3lm import Answer, BlockDenoiser, HierBD3LMGenerationOutput, never_written, right_justify, stream
from .masking_hierbd3lm import EXECUTION, PADDING, PLAN
from .order_hierbd3lm import BlockOrder, DependsOn, PlanParser, parse_plan
from .samplers_hierbd3lm import Sampler, make_sampler
from .schedule_hierbd3lm import (
    CanvasSchedule,
    ends_part,
    given_tokens,
    lay_out_plan,
    read_execution_start,
    repeat_rows,
)
from .settings_hierbd3lm import SAMPLERS_OF, SETTINGS, HierBD3LMGenerationConfig, read_foreign_names, resolve_settings

logger = logging.get_logger(__name__)

DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HierBD3LMGenerationMixin:
    """The `generate` of [`HierBD3LMForBlockDiffusion`].

    It inherits from no `GenerationMixin`, which is autoregressive; transformers looks for that ending of its name.
    """

    output_modalities = ("text",)  # for pipelines

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | Mapping[str, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        plan_ids: torch.LongTensor | None = None,
        generation_config: HierBD3LMGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        sampler: str | Sampler | None = None,
        execution_ids: torch.LongTensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plan_parser: PlanParser = parse_plan,
        logits_processor: list[LogitsProcessor] | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        num_return_sequences: int = 1,
        **kwargs: Any,
    ) -> HierBD3LMGenerationOutput:
        r"""
        Denoise a plan from the question, then the execution from question and plan, block by block.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, question_length)`):
                Questions, padded on either side; or the encoding that a tokenizer returns, with `input_ids` and
                `attention_mask`. `inputs` is another name for it.
            attention_mask (`torch.Tensor` of shape `(batch, question_length)`, *optional*):
                0 on padding; tokens other than the pad token if omitted.
            plan_ids (`torch.LongTensor` of shape `(batch, plan_length)`, *optional*):
                Plans for `stage="execution"`, right-padded, used verbatim: what a tokenizer gives, or `plan` of an
                earlier output. Opener and `<|end|>` are added where they are missing.
            generation_config ([`HierBD3LMGenerationConfig`], *optional*):
                Settings; those of the checkpoint if omitted.
            streamer (`BaseStreamer`, *optional*):
                Receives the question, drafts (`put_draft`, if it has that method) and finished blocks; one row only.
                One with the method `put_rows(answer, active)` follows several rows: it is called after each forward
                pass with the [`~denoising_hierbd3lm.Answer`] so far and the rows that are not finished, and returns
                rows to stop.
            sampler (`str` or [`~samplers_hierbd3lm.Sampler`], *optional*):
                The setting of that name, or a sampler of your own.
            execution_ids (`torch.LongTensor` of shape `(batch, execution_length)`, *optional*):
                Starts of the executions for `stage="execution"`, right-padded, used verbatim: they are encoded, not
                denoised.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                Decodes plans for `plan_parser`: needed, and read, with `execution_order="plan"` only.
            plan_parser (`Callable`, *optional*):
                Maps the text of a finished plan to what each step depends on, a list of earlier steps for each,
                counted from 0. None or a `ValueError` is a plan that it cannot parse. By default
                [`~order_hierbd3lm.parse_plan`].
            logits_processor (list of `LogitsProcessor`, *optional*):
                Applied to the logits of each candidate token, before it is drawn and before the sampler reads its
                probability. `input_ids`, `(num_candidates, length)`, is what stands before that token: question and
                answer, left-padded, with the mask token where nothing is denoised yet.
            stopping_criteria (list of `StoppingCriteria`, *optional*):
                Called after each forward pass with question and finished blocks, `(rows, length)`, left-padded, and
                `scores=None`. A row that one of them stops keeps what it has; it is not `finished`.
            num_return_sequences (`int`, *optional*):
                Answers to each question, or to each question and plan, next to each other in the output. A prompt is
                encoded once for all of them, in a pass of its own.
            kwargs: settings that override `generation_config`; see [`~settings_hierbd3lm.GenerationSettings`].

        Returns:
            [`HierBD3LMGenerationOutput`]

        Raises:
            ValueError: for an unknown setting, a question or plan that is too long, a plan without
                `stage="execution"` or the reverse, a streamer for several rows, or several answers at temperature 0.
        """
        # 1. Settings: the checkpoint's or the argument's, then the keyword arguments
        kwargs.pop("token_type_ids", None)  # some tokenizers return them; no backbone here reads them
        input_ids, attention_mask = read_inputs(kwargs.pop("inputs", input_ids), attention_mask)
        if isinstance(sampler, str):
            kwargs["sampler"] = sampler
        elif sampler is not None and (unread := kwargs.keys() & SAMPLERS_OF):
            raise ValueError(f"`{min(unread)}` has no effect with a sampler of your own: set it there")
        base = generation_config or self.generation_config
        settings = resolve_settings(base, read_foreign_names(self.config, base, kwargs))
        chosen = sampler if isinstance(sampler, Sampler) else make_sampler(settings)
        order = order_of(self, settings)
        settings = resolve_settings(settings, {"stage": check_stage(order, settings.stage)})
        # 2. The prompt: the question, and the plan if it is given
        if attention_mask is None:
            attention_mask = mask_of_padding(input_ids, self.config.pad_token_id)
        input_ids, attention_mask, plan_ids, execution_ids = repeat_rows(
            num_return_sequences, settings, input_ids, attention_mask, plan_ids, execution_ids
        )
        check_prompt(self.config, order, settings, input_ids, attention_mask, plan_ids, streamer)
        execution = read_execution_start(self.config, settings, execution_ids, input_ids)
        schedule = make_schedule(self.config, order, settings, attention_mask, plan_ids, execution)
        read_plan = plan_reader(order, settings, tokenizer, plan_parser)
        processors = LogitsProcessorList(logits_processor or [])
        criteria = StoppingCriteriaList(stopping_criteria or [])
        # 3. Denoise until every row has ended
        answer = Answer(schedule)
        with ending(streamer):
            if streamer is not None:
                streamer.put(input_ids.cpu())
            if order.is_causal and len(order.parts) == 1:
                write_causally(self, settings, answer, input_ids, attention_mask, streamer, processors, criteria)
            else:
                of_rows = input_ids, attention_mask, streamer, read_plan, num_return_sequences
                denoiser = BlockDenoiser(self, settings, chosen, answer, *of_rows)
                denoiser.run(processors, criteria)
        # 4. Gather what was written
        return answer.output(input_ids)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Not used: peft looks it up in the base model of a `LoraConfig(task_type="CAUSAL_LM")`."""
        raise NotImplementedError("block diffusion has no autoregressive steps to prepare inputs for")

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: load generation_config.json as a [`HierBD3LMGenerationConfig`]."""
        if generation_config is not None:
            self.generation_config = resolve_settings(generation_config, {})
            return
        # Fields of the model's configuration may be among them; the generation configuration refuses what it lacks.
        kwargs = {
            name: value for name, value in kwargs.items() if name in (*DOWNLOAD_ARGUMENTS, "_commit_hash", *SETTINGS)
        }
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            logger.info("No generation_config.json found: the default generation settings are used.")


def write_causally(
    model: Any,
    settings: HierBD3LMGenerationConfig,
    answer: Answer,
    question: torch.LongTensor,
    attention_mask: torch.Tensor,
    streamer: BaseStreamer | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> None:
    """Write the answer token by token, with the backbone's own `generate` and cache."""
    schedule, order = answer.schedule, answer.order
    context, block_ids, _, _ = schedule.context
    keep = torch.cat([attention_mask.bool(), block_ids != PADDING], dim=1)
    prompt, prompt_mask = right_justify(torch.cat([question, context], dim=1), keep)
    num_given = schedule.context_lengths[:, 0]
    num_left = int(schedule.limits[0]) - num_given
    if settings.max_new_tokens is not None:
        num_left = num_left.clamp(max=settings.max_new_tokens)
    awaits_end = schedule.progress.awaits_end[:, 0]
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": float(settings.temperature)}
        sampling |= {"top_p": float(settings.top_p), "top_k": 0}
    stopped = FirstStop(criteria, prompt)
    with seeded(settings.seed if settings.temperature > 0 else None, question.device):
        sequences = model.backbone.generate(
            prompt,
            attention_mask=prompt_mask,
            max_new_tokens=int(num_left.amax()),
            logits_processor=processors,
            stopping_criteria=[LastEnd(awaits_end, order), StoppedRows(answer, streamer), stopped],
            streamer=None if streamer is None else StreamerAfterPrompt(streamer, order),
            # what a checkpoint's own settings may say otherwise
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=order.pad_token_id,
            suppress_tokens=never_written(order, settings).tolist(),
            use_cache=True,
            **sampling,
        )
    tokens = sequences[:, prompt.shape[1] :]
    inside = torch.ones_like(tokens, dtype=torch.bool)
    is_last_end = ends_part(tokens, inside, awaits_end[:, None], order.execution_token_id)
    ended = (is_last_end & (tokens == order.end_token_id)).cumsum(dim=1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    within = (ended.cumsum(dim=1) <= 1) & (columns < torch.minimum(num_left, stopped.lengths)[:, None])
    positions = (answer.question_lengths + num_given)[:, None] + columns
    index = torch.arange(len(tokens), device=tokens.device)
    answer.write(index, within, tokens, positions, torch.zeros_like(tokens), columns + 1)
    answer.finished = ((ended > 0) & within).any(dim=1)
    answer.num_forward_passes += within.sum(dim=1)
    if hasattr(streamer, "put_rows"):
        streamer.put_rows(answer, [])


class LastEnd(StoppingCriteria):
    """Stops a row at the `<|end|>` that ends its run of plan and execution.

    Args:
        awaits_end (`torch.BoolTensor` of shape `(batch,)`): rows that the next `<|end|>` ends.
    """

    def __init__(self, awaits_end: torch.BoolTensor, order: BlockOrder):
        self.awaits_end, self.ended = awaits_end.clone(), torch.zeros_like(awaits_end)
        self.order = order

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        last = input_ids[:, -1]
        self.ended = self.ended | (self.awaits_end & (last == self.order.end_token_id))
        self.awaits_end = self.awaits_end | (last == self.order.execution_token_id)
        return self.ended


class StoppedRows(StoppingCriteria):
    """Stops the rows that a streamer with `put_rows` returns."""

    def __init__(self, answer: Answer, streamer: BaseStreamer | None):
        self.answer, self.streamer = answer, streamer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if hasattr(self.streamer, "put_rows"):
            stopped[list(self.streamer.put_rows(self.answer, list(range(len(input_ids)))))] = True
        return stopped


class FirstStop(StoppingCriteria):
    """Stops the rows that some criteria stop, and keeps how many tokens each had by then: `lengths`, `(batch,)`."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: torch.LongTensor):
        self.criteria, self.prompt_length = criteria, prompt.shape[1]
        self.lengths = torch.full((len(prompt),), torch.iinfo(torch.long).max, device=prompt.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        length = input_ids.shape[1] - self.prompt_length
        if self.criteria:
            self.lengths[self.criteria(input_ids, None) & (self.lengths > length)] = length
        return self.lengths <= length


class StreamerAfterPrompt(BaseStreamer):
    """Forwards generated tokens, and the opener before them, to a streamer that has received the question."""

    def __init__(self, streamer: BaseStreamer, order: BlockOrder):
        self.streamer, self.order, self.is_prompt = streamer, order, True

    def put(self, value: torch.LongTensor) -> None:
        stream(self.streamer, value.flatten()[-1:] if self.is_prompt else value, self.order)
        self.is_prompt = False

    def end(self) -> None:
        pass


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators within the context, and restore their state afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def ending(streamer: BaseStreamer | None) -> Iterator[None]:
    """End the streamer when the context is left, also by an exception: its consumer waits for that."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def read_inputs(
    inputs: torch.LongTensor | Mapping[str, torch.Tensor] | None, attention_mask: torch.Tensor | None
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """Return `input_ids` and `attention_mask` of what `generate` is given.

    Raises:
        ValueError: for anything but a tensor of integers, or a mapping that holds one.
    """
    if isinstance(inputs, Mapping):
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        inputs = inputs.get("input_ids")
    if not isinstance(inputs, torch.Tensor) or inputs.is_floating_point() or inputs.dtype == torch.bool:
        got = inputs.dtype if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ValueError(
            f"`input_ids` must be a tensor of token ids of shape (batch, length), as a tokenizer returns with "
            f"`return_tensors='pt'`, but got {got}"
        )
    return inputs.long(), attention_mask


def order_of(model: Any, settings: HierBD3LMGenerationConfig) -> BlockOrder:
    """Return the order that these settings generate in: the model's, with their block size.

    Raises:
        ValueError: if a part is not a whole number of such blocks, or has only one possible block size.
    """
    order, block_size = model.order, settings.block_size
    if block_size is None:
        return order
    lengths = [part.max_len for part in order.parts]
    if order.is_autoregressive or order.is_joint:
        raise ValueError(f"`block_size` must be None for autoregressive and joint models, but got {block_size}")
    if any(length % block_size for length in lengths):
        raise ValueError(f"`block_size` must divide the maximum lengths {lengths}, but got {block_size}")
    return replace(order, parts=tuple(replace(part, block_size=block_size) for part in order.parts))


def plan_reader(
    order: BlockOrder, settings: HierBD3LMGenerationConfig, tokenizer: Any, plan_parser: PlanParser
) -> Callable[[list[int]], tuple[DependsOn, bool]] | None:
    """Return what reads the order of the steps from the ids of a plan; None if no step is to follow one.

    Raises:
        ValueError: without a tokenizer, if it is needed.
    """
    if not order.follows_plan or settings.stage == "plan":
        return None
    if tokenizer is None:
        raise ValueError("`tokenizer` must be given for execution_order='plan', whose plans are read, but got None")
    return lambda ids: order.read_plan(tokenizer.decode(ids, skip_special_tokens=True), plan_parser)


def segment_limits(config: Any, order: BlockOrder, settings: HierBD3LMGenerationConfig) -> dict[int, int]:
    """Return the maximum number of tokens of each segment.

    Raises:
        ValueError: if a limit exceeds the model's, or is not a whole number of blocks.
    """
    for name in ("max_execution_len", "max_new_tokens") if order.follows_plan else ():
        if getattr(settings, name) is not None:
            raise ValueError(
                f"`{name}` must be None for execution_order='plan', where a step has at most step_len tokens, but got "
                f"{getattr(settings, name)}"
            )
    limits = {}
    for segment, name in ((PLAN, "plan"), (EXECUTION, "execution")):
        wanted, most = getattr(settings, f"max_{name}_len"), getattr(config, f"{name}_len")
        multiple = order.multiple(segment)
        if wanted is None or (segment == PLAN and settings.stage == "execution"):
            limits[segment] = most  # a given plan is never cut
            continue
        if not multiple <= wanted <= most or wanted % multiple:
            raise ValueError(
                f"`max_{name}_len` must be a multiple of the block size {multiple} up to {most}, but got {wanted}"
            )
        if wanted < 2:
            raise ValueError(f"`max_{name}_len` must be at least 2, the opener and a token, but got {wanted}")
        limits[segment] = wanted
    for part in order.parts:
        if sum(limits[segment] for segment in part.segments) % part.block_size:
            raise ValueError(
                f"`max_plan_len + max_execution_len` must be a multiple of the block size {part.block_size}, but got "
                f"{limits[PLAN]} + {limits[EXECUTION]}"
            )
    return limits


def check_stage(order: BlockOrder, stage: str) -> str:
    """Return the stage; without a plan `full` is `execution`.

    Raises:
        ValueError: for a stage that the order does not have.
    """
    if PLAN not in order.segments:
        if stage == "plan":
            raise ValueError("`stage` must not be 'plan' for a model without a plan (`plan_len=0`)")
        return "execution"
    if stage == "plan" and order.is_aligned:
        raise ValueError("`stage` must not be 'plan' without the hierarchical mask: the plan sees the execution")
    return stage


def make_schedule(
    config: Any,
    order: BlockOrder,
    settings: HierBD3LMGenerationConfig,
    attention_mask: torch.Tensor,
    plan_ids: torch.LongTensor | None,
    execution: tuple[torch.LongTensor, torch.LongTensor] | None = None,
) -> CanvasSchedule:
    """Return what the rows of a `generate` call denoise; arguments as in `generate`.

    Args:
        execution: what [`read_execution_start`] returns.
    """
    lengths = segment_limits(config, order, settings)
    limits = [min(part.max_len, sum(lengths[segment] for segment in part.segments)) for part in order.parts]
    stage = {"full": {PLAN, EXECUTION}, "plan": {PLAN}, "execution": {EXECUTION}}[settings.stage]
    written = [not stage.isdisjoint(part.segments) for part in order.parts]
    batch, device = len(attention_mask), attention_mask.device
    plan = (None, None)
    if plan_ids is not None:
        plan = lay_out_plan(config, order, plan_ids.to(device))
    given = given_tokens(order, batch, device, *plan, *(execution or ()))
    question_lengths = attention_mask.bool().sum(dim=1)
    return CanvasSchedule(
        order, limits, written, given, question_lengths, settings.stage == "plan", settings.max_new_tokens
    )


def mask_of_padding(input_ids: torch.LongTensor, pad_token_id: int) -> torch.BoolTensor:
    """Return the mask of questions that come without one, `(batch, length)`, with a warning where it is a guess."""
    is_real = input_ids != pad_token_id
    started, ends = is_real.cumsum(dim=1) > 0, is_real.flip(1).cumsum(dim=1).flip(1) == 0
    if (started & ~ends & ~is_real).any():
        logger.warning_once(
            f"`input_ids` has pad tokens ({pad_token_id}) inside a question, which are read as padding: pass the "
            "tokenizer's `attention_mask`"
        )
    return is_real


def check_prompt(
    config: Any,
    order: BlockOrder,
    settings: HierBD3LMGenerationConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    plan_ids: torch.Tensor | None,
    streamer: BaseStreamer | None,
) -> None:
    """Check the arguments of `generate`."""
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`input_ids` and `attention_mask` must have one shape (batch, length), but got "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )
    if len(input_ids) == 0:
        raise ValueError("`input_ids` must have at least one row, but has none")
    longest = int(attention_mask.sum(dim=1).amax()) if input_ids.numel() else 0
    if longest > config.question_len:
        raise ValueError(f"`input_ids` must have at most question_len={config.question_len} tokens, but got {longest}")
    for role in ("mask", "plan", "execution", "end"):
        token_id = getattr(config, f"{role}_token_id")
        if found := ((input_ids == token_id) & attention_mask.bool()).any(dim=1).nonzero().flatten().tolist():
            raise ValueError(f"`input_ids` must not contain the {role} token ({token_id}), but row {found[0]} does")
    plans = PLAN in order.segments
    if (settings.stage == "execution" and plans) != (plan_ids is not None):
        model = "" if plans else " of a model without a plan (`plan_len=0`)"
        raise ValueError(
            f"`plan_ids` must be given for stage='execution' of a model with a plan and for no other, but got "
            f"stage={settings.stage!r}{model} {'without' if plan_ids is None else 'with'} plan_ids"
        )
    if plan_ids is not None and (plan_ids.ndim != 2 or len(plan_ids) != len(input_ids)):
        raise ValueError(
            f"`plan_ids` must be (batch, length) with batch {len(input_ids)}, got {tuple(plan_ids.shape)}"
        )
    if streamer is not None and order.follows_plan and not hasattr(streamer, "put_rows"):
        raise ValueError("`streamer` must be None for execution_order='plan', where several steps are written at once")
    if streamer is not None and len(input_ids) != 1 and not hasattr(streamer, "put_rows"):
        raise ValueError(f"`streamer` must be None for more than one row, but got {len(input_ids)} rows")
