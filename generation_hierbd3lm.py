"""How a plan and an execution are denoised: generation settings, samplers, the block cache and `generate()`."""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .diffusion_hierbd3lm import SCHEDULES
from .masking_hierbd3lm import CLEAN, EXECUTION, PADDING, PLAN, QUESTION, TokenLayout, layout_from_segments

logger = logging.get_logger(__name__)

STAGES = ("full", "joint", "plan", "execution")
SCHEDULED_SAMPLERS = ("first_hitting", "ancestral")  # when a token is revealed is drawn before the block starts
ADAPTIVE_SAMPLERS = ("confidence", "entropy")  # the predictions say which tokens are revealed
SAMPLERS = SCHEDULED_SAMPLERS + ADAPTIVE_SAMPLERS


DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HierBD3LMGenerationConfig(GenerationConfig):
    r"""
    Settings of [`HierBD3LMGenerationMixin.generate`].

    Args:
        stage (`str`, defaults to `"full"`):
            `full` denoises plan and execution in the order that the model is trained for, `plan` the plan only,
            `execution` the execution of given `plan_ids`; `joint` is `full`, and asks for a model that denoises plan
            and execution at the same time. For a model without a plan `full` and `execution` are the same.
        sampler (`str`, defaults to `"confidence"`):
            `first_hitting`: one token a step at random times; exact (Zheng et al. 2024, algorithm 1).
            `ancestral`: `num_steps` equal time steps a block (MDLM, section 3.4); a step that reveals nothing costs
            no forward pass.
            `confidence`: every token whose probability exceeds `threshold`.
            `entropy`: the tokens of least entropy, as many as keep the sum of the others' entropies within
            `entropy_bound` (Ben-Hamu et al. 2025, algorithm 1).
        num_steps (`int`, defaults to 16): steps per block of `ancestral`.
        threshold (`float`, defaults to 0.9): of `confidence`, in (0, 1].
        entropy_bound (`float`, defaults to 0.1): of `entropy`, in nats, at least 0.
        tokens_per_step (`int`, defaults to 1): tokens that `confidence` and `entropy` reveal a step at the least.
        left_to_right (`bool`, defaults to `False`):
            Whether `confidence` and `entropy` go through a block from its left to the first token that they are not
            sure of (as Stern et al. 2018, section 3), not through the surest tokens first.
        temperature (`float`, defaults to 0.0):
            Of the tokens' distribution; 0 is greedy and draws nothing at random: the scheduled samplers then reveal
            from left to right at evenly spaced times. Which tokens are accepted is never tempered.
        top_p (`float`, defaults to 1.0): nucleus of the tokens' distribution, in (0, 1].
        fill_after_end (`bool`, defaults to `True`):
            Sets what follows an `<|end|>` in its block to `<|end|>` without a forward pass, as all data has it. With
            `False` these tokens are denoised like any other before they are replaced.
        max_plan_len, max_execution_len (`int`, *optional*):
            Most tokens of each segment, opener and `<|end|>` counted; whole blocks. The model's lengths if omitted.
            Where plan and execution are one run of tokens, their sum is the most of that.
        compile_steps (`bool`, defaults to `False`):
            Runs passes through `torch.compile`: up to a minute in the first answers, until it has seen which sizes
            vary, and less time for every pass after that.
        seed (`int`, *optional*): of the random draws; torch's global generator draws one if omitted.

    Raises:
        ValueError: for an unknown setting or a value out of its range.
    """

    # The Trainer reads these and writes the tokenizer's here; special tokens are the model configuration's to name.
    bos_token_id = eos_token_id = pad_token_id = property(lambda self: None, lambda self, token_id: None)

    def __init__(self, **kwargs: Any):
        # The parent's __init__ is left out on purpose, as in DiffusionGemma: none of its settings apply.
        self.stage: str = kwargs.pop("stage", "full")
        self.sampler: str = kwargs.pop("sampler", "confidence")
        self.num_steps: int = kwargs.pop("num_steps", 16)
        self.threshold: float = kwargs.pop("threshold", 0.9)
        self.entropy_bound: float = kwargs.pop("entropy_bound", 0.1)
        self.tokens_per_step: int = kwargs.pop("tokens_per_step", 1)
        self.left_to_right: bool = kwargs.pop("left_to_right", False)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.top_p: float = kwargs.pop("top_p", 1.0)
        self.fill_after_end: bool = kwargs.pop("fill_after_end", True)
        self.max_plan_len: int | None = kwargs.pop("max_plan_len", None)
        self.max_execution_len: int | None = kwargs.pop("max_execution_len", None)
        self.compile_steps: bool = kwargs.pop("compile_steps", False)
        self.seed: int | None = kwargs.pop("seed", None)
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool | None = kwargs.pop("_from_model_config", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(
                f"`generation_config` has no setting {', '.join(kwargs)}; it has {', '.join(_settings())}"
            )
        self.validate()

    def validate(self, **unused_kwargs: Any) -> None:
        """Checks every setting; see the class for the ranges."""
        for name, choices in (("stage", STAGES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {getattr(self, name)!r}")
        for name in ("num_steps", "tokens_per_step"):
            _check_number(self, name, int, "an integer >= 1", lambda value: value >= 1)
        for name in ("max_plan_len", "max_execution_len", "seed"):
            if getattr(self, name) is not None:
                _check_number(self, name, int, "an integer >= 0 or None", lambda value: value >= 0)
        _check_number(self, "threshold", int | float, "a number in (0, 1]", lambda value: 0 < value <= 1)
        _check_number(self, "top_p", int | float, "a number in (0, 1]", lambda value: 0 < value <= 1)
        _check_number(self, "entropy_bound", int | float, "a number >= 0", lambda value: value >= 0)
        _check_number(self, "temperature", int | float, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        for name in ("left_to_right", "fill_after_end", "compile_steps"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but got {getattr(self, name)!r}")

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("block diffusion has samplers instead of autoregressive generation modes")

    def from_model_config(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a HierBD3LMConfig holds no generation settings")


def _settings() -> list[str]:
    return [name for name in HierBD3LMGenerationConfig().__dict__ if name[0] != "_" and name != "transformers_version"]


def _check_number(config: HierBD3LMGenerationConfig, name: str, kind: type, accepted: str, in_range: Any) -> None:
    value = getattr(config, name)
    if not isinstance(value, kind) or isinstance(value, bool) or not in_range(value):
        raise ValueError(f"`{name}` must be {accepted}, but got {value!r}")


@dataclass
class HierBD3LMGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`):
            Question (left-padded as given), plan and execution with their special tokens, right-padded.
        plan, execution (`torch.LongTensor` of shape `(batch, plan_length)` and `(batch, execution_length)`):
            Content of the segments, without opener and `<|end|>`, right-padded with the pad token.
        finished (`torch.BoolTensor` of shape `(batch,)`):
            Whether every denoised segment was closed by an `<|end|>` within its length.
        num_forward_passes (`torch.LongTensor` of shape `(batch,)`): passes in which the row took part (NFE).
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`):
            Denoised tokens up to and with the `<|end|>` of each segment, per forward pass.
    """

    sequences: torch.LongTensor | None = None
    plan: torch.LongTensor | None = None
    execution: torch.LongTensor | None = None
    finished: torch.BoolTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None


class BlockCacheLayer(DynamicLayer):
    """One layer of a [`BlockCache`]: `[scratch | finished blocks]` along the length, allocated once."""

    def __init__(self, cache: "BlockCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        self.allocate(*shape, key_states.dtype, key_states.device)

    def allocate(
        self, num_heads: int, key_size: int, value_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        shape = self.cache.num_rows, num_heads, self.cache.scratch + self.cache.capacity
        # Zeros, as masked attention still multiplies what a column holds, and memory may hold NaN.
        self.keys, self.values = (
            torch.zeros(*shape, size, dtype=dtype, device=device) for size in (key_size, value_size)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts this pass's keys and values into the scratch space; returns views of them and all finished blocks."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop, length = self.cache.scratch, key_states.shape[2]
        rows = slice(0, self.cache.num_rows)
        self.keys[rows, :, stop - length : stop] = key_states
        self.values[rows, :, stop - length : stop] = value_states
        view = slice(stop - length, stop + self.cache.used)
        return self.keys[rows, :, view], self.values[rows, :, view]

    def get_seq_length(self) -> int:
        return self.cache.used


class BlockCache(Cache):
    """Keys and values of finished blocks. A pass sees them and leaves no trace; `commit` keeps its clean tokens.

    Rows fill at their own pace, each from the left; columns that a row has not filled are padding to it.

    Args:
        num_layers: layers of the backbone.
        num_rows: rows of the batch.
        scratch: most tokens that a pass may have.
        capacity: most tokens that a row may keep.
        is_compiled: whether passes are compiled. Layers are best allocated before the first one, so that it is no case
            of its own.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        scratch: int,
        capacity: int,
        device: torch.device,
        is_compiled: bool = False,
    ):
        super().__init__(layers=[BlockCacheLayer(self) for _ in range(num_layers)])
        self.is_compiled = is_compiled
        self.num_rows, self.scratch, self.capacity = num_rows, scratch, capacity
        self.used = 0  # columns that a pass sees: some row has filled them
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._block_ids = torch.full((num_rows, capacity), PADDING, device=device)
        self._position_ids = torch.zeros_like(self._block_ids)

    @property
    def layout(self) -> TokenLayout:
        """Layout of the cached tokens, `(batch, used)`."""
        block_ids = self._block_ids[: self.num_rows, : self.used]
        positions = self._position_ids[: self.num_rows, : self.used]
        return TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), positions)

    def commit(self, block_ids: torch.Tensor, position_ids: torch.Tensor, pass_length: int) -> None:
        """Keeps the first tokens of the pass that has just run.

        Args:
            block_ids, position_ids (`torch.LongTensor` of shape `(batch, length)`): of those tokens.
            pass_length: tokens of the pass.
        """
        start, real = self.scratch - pass_length, block_ids != PADDING
        if self.num_rows == 1 and real.all():
            self._commit_row(block_ids, position_ids, start)
            return
        row, source = real.nonzero(as_tuple=True)
        target = (self.lengths[:, None] + real.long().cumsum(dim=1) - 1)[row, source]
        self._block_ids[row, target] = block_ids[row, source]
        self._position_ids[row, target] = position_ids[row, source]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[row, :, self.scratch + target] = states[row, :, start + source]
        self.lengths += real.sum(dim=1)
        self.used = int(self.lengths.max())

    def _commit_row(self, block_ids: torch.Tensor, position_ids: torch.Tensor, start: int) -> None:
        """The same for a single row without padding, whose columns move as one slice; `start` is the first."""
        length = block_ids.shape[1]
        target = slice(self.used, self.used + length)
        self._block_ids[:1, target], self._position_ids[:1, target] = block_ids, position_ids
        column = self.scratch + self.used
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[:1, :, column : column + length] = states[:1, :, start : start + length]
        self.lengths += length
        self.used += length

    def keep_rows(self, keep: torch.BoolTensor) -> torch.LongTensor:
        """Drops the other rows: the last rows move into the holes, so that no more than those are copied.

        Returns:
            `torch.LongTensor` of shape `(kept,)`: the old index of every row.
        """
        order = keep.nonzero()[:, 0]
        count = len(order)
        is_hole = ~keep[:count]
        moved = order[order >= count]
        new_order = torch.arange(count, device=keep.device)
        new_order[is_hole] = moved
        holes = is_hole.nonzero()[:, 0]
        for states in [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]:
            states[holes] = states[moved]
        for ids in (self._block_ids, self._position_ids):
            ids[holes] = ids[moved]
        self.lengths, self.num_rows = self.lengths[new_order], count
        self.used = max(self.lengths.tolist(), default=0)
        return new_order


@dataclass
class ActiveRows:
    """The rows that still denoise. The first dimension of every tensor is the row.

    Args:
        index: `(rows,)`, place of the row in the batch.
        segment, block, position: `(rows,)`, of the block that is being denoised: its segment, its rank and the
            position of its first token.
        opens, limit: `(rows,)`, whether that block is its segment's first; position behind the longest segment.
        pending, pending_block_ids, pending_position_ids: `(rows, length)`, clean tokens that are not cached yet.
        canvas, canvas_block_ids, canvas_position_ids: `(rows, width)`, the block; -1 where it is narrower than width.
        reveal_times: `(rows, width)`, times in [0, 1] at which the scheduled samplers reveal each token, 1 first.
    """

    index: torch.Tensor
    segment: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor
    opens: torch.Tensor
    limit: torch.Tensor
    pending: torch.Tensor
    pending_block_ids: torch.Tensor
    pending_position_ids: torch.Tensor
    canvas: torch.Tensor
    canvas_block_ids: torch.Tensor
    canvas_position_ids: torch.Tensor
    reveal_times: torch.Tensor

    def select(self, order: torch.LongTensor) -> "ActiveRows":
        return ActiveRows(**{item.name: getattr(self, item.name)[order] for item in fields(self)})


class BlockDenoiser:
    """One `generate` call: the rows, the cache, the random numbers and what has been written so far.

    Args:
        prompt, prompt_segments (`torch.LongTensor` of shape `(batch, length)`): given tokens and their segments.
    """

    def __init__(
        self,
        model: Any,
        settings: HierBD3LMGenerationConfig,
        prompt: torch.LongTensor,
        prompt_segments: torch.LongTensor,
        streamer: BaseStreamer | None,
    ):
        self.model, self.settings, self.streamer = model, settings, streamer
        self.device, self.config = prompt.device, model.config
        self.block_sizes = self._per_segment(0, self.config.plan_block_size, self.config.execution_block_size)
        self.openers = self._per_segment(0, self.config.plan_token_id, self.config.execution_token_id)
        self.limits = self._per_segment(0, *segment_limits(self.config, settings))
        self.never_written = never_written(self.config).to(self.device)
        self.width = max(self.config.plan_block_size, self.config.execution_block_size)
        self.first_segment = EXECUTION if settings.stage == "execution" else PLAN
        self.last_segment = PLAN if settings.stage == "plan" else EXECUTION
        self.generator = torch.Generator(device=self.device)
        if settings.temperature > 0:
            self.generator.manual_seed(int(torch.randint(2**62, ())) if settings.seed is None else settings.seed)
        self._start(prompt, prompt_segments)

    @functools.cached_property
    def opens_finished(self) -> bool:
        """Whether a block may have nothing to denoise when it is opened: one that is an opener, or given."""
        return 1 in (self.config.plan_block_size, self.config.execution_block_size)

    def _per_segment(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def _start(self, prompt: torch.LongTensor, prompt_segments: torch.LongTensor) -> None:
        """Puts the whole prompt into `pending` and opens every row's first block."""
        batch = prompt.shape[0]
        block_ids, position_ids = layout_from_segments(prompt_segments, *self.config.block_grid)
        position = (prompt_segments != PADDING).sum(dim=1)
        segment = torch.full_like(position, self.first_segment)
        blank = prompt.new_zeros(batch, self.width)
        self.rows = ActiveRows(
            index=torch.arange(batch, device=self.device),
            segment=segment,
            block=block_ids.amax(dim=1).clamp(min=0) + 1 if prompt.shape[1] else torch.ones_like(position),
            position=position,
            opens=torch.ones_like(position, dtype=torch.bool),
            limit=position + self.limits[segment],
            pending=prompt,
            pending_block_ids=block_ids,
            pending_position_ids=position_ids,
            canvas=blank,
            canvas_block_ids=blank,
            canvas_position_ids=blank,
            reveal_times=torch.zeros(blank.shape, dtype=torch.float64, device=self.device),
        )
        self._open_blocks(torch.ones_like(self.rows.opens))
        self.cache = BlockCache(
            num_layers=self.config.backbone_config.num_hidden_layers,
            num_rows=batch,
            scratch=prompt.shape[1] + 3 * self.width,  # a pass: pending, at most two blocks of it new, and the canvas
            capacity=prompt.shape[1] + int(self.limits.sum()),
            device=self.device,
            is_compiled=self.settings.compile_steps,
        )
        if self.settings.compile_steps:
            for layer, shape in zip(self.cache.layers, self.model.cache_shapes, strict=False):
                layer.allocate(*shape, self.model.dtype, self.device)
        # Plan and execution, by their positions behind the question.
        self.question_lengths = (prompt_segments == QUESTION).sum(dim=1)
        self.tokens = torch.full((batch, int(self.limits.sum())), self.config.pad_token_id, device=self.device)
        self.segments = torch.full_like(self.tokens, PADDING)
        self._write(prompt_segments == PLAN, prompt, position_ids, torch.full_like(segment, PLAN))
        self.finished = torch.ones(batch, dtype=torch.bool, device=self.device)
        self.num_forward_passes = torch.zeros_like(position)

    def run(self) -> None:
        """Denoises until no row is left."""
        self._settle()
        while len(self.rows.index):
            self._step()
            self._settle()

    def _step(self) -> None:
        """One forward pass: encodes what is pending, denoises one step of every row's block."""
        rows, masked = self.rows, self._masked()
        candidates = masked & self._due(masked) if self.settings.sampler in SCHEDULED_SAMPLERS else masked
        logits = self.model(
            input_ids=rows.pending,
            block_ids=rows.pending_block_ids,
            position_ids=rows.pending_position_ids,
            noisy_input_ids=rows.canvas,
            noisy_block_ids=rows.canvas_block_ids,
            noisy_position_ids=rows.canvas_position_ids,
            past_key_values=self.cache,
            logits_to_keep=candidates,
        ).logits
        self.num_forward_passes[rows.index] += 1
        if rows.pending.shape[1]:
            self.cache.commit(
                rows.pending_block_ids, rows.pending_position_ids, rows.pending.shape[1] + rows.canvas.shape[1]
            )
            for name in ("pending", "pending_block_ids", "pending_position_ids"):
                setattr(rows, name, getattr(rows, name)[:, :0])
        self._reveal(candidates, logits.float().index_fill(-1, self.never_written, -math.inf))
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=rows.canvas[rows.canvas_block_ids != PADDING].cpu())

    def _masked(self) -> torch.BoolTensor:
        return self.rows.canvas == self.config.mask_token_id

    def _due(self, masked: torch.BoolTensor) -> torch.BoolTensor:
        """The tokens that a scheduled sampler reveals next: those of the latest time."""
        times = self.rows.reveal_times.masked_fill(~masked, -1)
        return times == times.amax(dim=1, keepdim=True)

    def _reveal(self, candidates: torch.BoolTensor, logits: torch.FloatTensor) -> None:
        """Draws the candidates' tokens and writes those that the sampler accepts."""
        tokens = sample_tokens(logits, self.settings.temperature, self.settings.top_p, self.generator)
        drafted = self.rows.canvas.masked_scatter(candidates, tokens)
        accepted = candidates
        if self.settings.sampler in ADAPTIVE_SAMPLERS:
            accepted = accept_adaptively(candidates, logits, tokens, self.settings)
        self.rows.canvas = torch.where(accepted, drafted, self.rows.canvas)
        if self.settings.fill_after_end:
            self.rows.canvas = self.rows.canvas.masked_fill(self._after_end(), self.config.end_token_id)

    def _after_end(self) -> torch.BoolTensor:
        """Tokens of the block behind its first `<|end|>`, and that one."""
        inside = self.rows.canvas_block_ids != PADDING
        return inside & ((inside & (self.rows.canvas == self.config.end_token_id)).cumsum(dim=1) > 0)

    def _settle(self) -> None:
        """Closes finished blocks until every row that is left has something to denoise."""
        while len(self.rows.index):
            done = ~self._masked().any(dim=1)
            after_end = self._after_end()
            segment_done = done & self._ends_segment(after_end)
            ended = segment_done & (self.rows.segment == self.last_segment)
            any_done, any_ended = torch.stack([done.any(), ended.any()]).tolist()  # the step's one synchronisation
            if not any_done:
                return
            self._close_blocks(done, segment_done, after_end)
            if any_ended:
                order = self.cache.keep_rows(~ended)
                self.rows, done = self.rows.select(order), done[order]
            self._open_blocks(done)
            if not self.opens_finished:
                return

    def _ends_segment(self, after_end: torch.BoolTensor) -> torch.BoolTensor:
        """Whether the segment has no block behind the one that is denoised: `(rows,)`."""
        position = self.rows.position + self.block_sizes[self.rows.segment]
        return after_end.any(dim=1) | (position >= self.rows.limit)

    def _close_blocks(
        self, done: torch.BoolTensor, segment_done: torch.BoolTensor, after_end: torch.BoolTensor
    ) -> None:
        """Writes the finished blocks down, queues them for the cache and moves their rows on."""
        rows = self.rows
        rows.canvas = rows.canvas.masked_fill(after_end & done[:, None], self.config.end_token_id)
        closing = done[:, None] & (rows.canvas_block_ids != PADDING)
        self._write(closing, rows.canvas, rows.canvas_position_ids, rows.segment)
        self.finished[rows.index] &= ~segment_done | after_end.any(dim=1)
        if self.streamer is not None:
            self.streamer.put(rows.canvas[closing & ~after_end].cpu())
        block_ids = rows.canvas_block_ids.masked_fill(~done[:, None], PADDING)
        rows.pending = torch.cat([rows.pending, rows.canvas], dim=1)
        rows.pending_block_ids = torch.cat([rows.pending_block_ids, block_ids], dim=1)
        rows.pending_position_ids = torch.cat([rows.pending_position_ids, rows.canvas_position_ids], dim=1)
        rows.block = rows.block + done
        rows.position = rows.position + done * self.block_sizes[rows.segment]
        rows.segment = torch.where(segment_done, EXECUTION, rows.segment)
        rows.opens = torch.where(done, segment_done, rows.opens)
        rows.limit = torch.where(segment_done, rows.position + self.limits[rows.segment], rows.limit)

    def _write(
        self, which: torch.BoolTensor, tokens: torch.Tensor, position_ids: torch.Tensor, segment: torch.Tensor
    ) -> None:
        """Writes the active rows' tokens down where `which`; all are `(rows, length)`, `segment` is `(rows,)`."""
        row, column = which.nonzero(as_tuple=True)
        index = self.rows.index[row]
        target = index, position_ids[row, column] - self.question_lengths[index]
        self.tokens[target] = tokens[row, column]
        self.segments[target] = segment[row]

    def _open_blocks(self, which: torch.BoolTensor) -> None:
        """Gives the rows a fresh block: masks, behind the opener where it is the segment's first."""
        rows, columns = self.rows, torch.arange(self.width, device=self.device)
        size = self.block_sizes[rows.segment][:, None]
        inside = columns < size
        canvas = torch.where(inside, self.config.mask_token_id, self.config.pad_token_id)
        canvas = torch.where((columns == 0) & rows.opens[:, None], self.openers[rows.segment][:, None], canvas)
        fresh = {
            "canvas": canvas,
            "canvas_block_ids": torch.where(inside, rows.block[:, None], PADDING),
            "canvas_position_ids": torch.where(inside, rows.position[:, None] + columns, 0),
            "reveal_times": self._reveal_times(size, columns),
        }
        for name, value in fresh.items():
            setattr(rows, name, torch.where(which[:, None], value, getattr(rows, name)))

    def _reveal_times(self, size: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """When each token is revealed, from time 1 to 0: a token is still masked at time t with probability p(t).

        Times are independent, so the next of n masked tokens comes at the largest of n: the first hitting time of
        Zheng et al. 2024 (equation 7), whose order alone matters as the network is not told the time. `ancestral`
        rounds times up to its grid. `(rows, width)`, float64.
        """
        shape = len(size), self.width
        if self.settings.temperature == 0:
            quantile = (1 - (columns + 0.5) / size).double().expand(shape).clamp(min=0)
        else:
            quantile = torch.rand(shape, generator=self.generator, device=self.device, dtype=torch.float64)
        times = SCHEDULES[self.config.noise].time(quantile)
        if self.settings.sampler == "ancestral":
            times = (times * self.settings.num_steps).ceil() / self.settings.num_steps
        return times

    def output(self, question: torch.LongTensor) -> HierBD3LMGenerationOutput:
        """Everything that was written, as `generate` returns it."""
        segments = {}
        num_tokens = torch.zeros_like(self.num_forward_passes)
        for segment in (PLAN, EXECUTION):
            inside = self.segments == segment
            number = inside.cumsum(dim=1)
            ended = (inside & (self.tokens == self.config.end_token_id)).cumsum(dim=1) > 0
            content = inside & ~ended & (number > 1)
            segments[segment] = left_justify(self.tokens, content, self.config.pad_token_id)
            if segment >= self.first_segment:
                num_tokens += content.sum(dim=1) + ended.any(dim=1)
        answer_length = int((self.segments != PADDING).sum(dim=1).amax())
        return HierBD3LMGenerationOutput(
            sequences=torch.cat([question, self.tokens[:, :answer_length]], dim=1),
            plan=segments[PLAN],
            execution=segments[EXECUTION],
            finished=self.finished,
            num_forward_passes=self.num_forward_passes,
            tokens_per_forward=num_tokens / self.num_forward_passes,
        )


class HierBD3LMGenerationMixin:
    """Gives [`HierBD3LMForBlockDiffusion`] its `generate`.

    It inherits from no `GenerationMixin`, which is autoregressive; transformers looks for that ending of its name.
    """

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        plan_ids: torch.LongTensor | None = None,
        generation_config: HierBD3LMGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> HierBD3LMGenerationOutput:
        r"""
        Denoises a plan from the question, then the execution from question and plan, block by block.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, question_length)`):
                Questions, padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch, question_length)`, *optional*):
                0 on padding; tokens other than the pad token if omitted.
            plan_ids (`torch.LongTensor` of shape `(batch, plan_length)`, *optional*):
                Plans for `stage="execution"`, right-padded, used verbatim: what a tokenizer gives, or `plan` of an
                earlier output. Opener and `<|end|>` are added where they lack.
            generation_config ([`HierBD3LMGenerationConfig`], *optional*):
                Settings; those of the checkpoint if omitted.
            streamer (`BaseStreamer`, *optional*):
                Receives the question, drafts (`put_draft`, where it has that) and finished blocks; for one row only.
            kwargs: settings that override `generation_config`.

        Returns:
            [`HierBD3LMGenerationOutput`]

        Raises:
            ValueError: for an unknown setting, a question or plan over its length, a plan without
                `stage="execution"` or the reverse, or a streamer for several rows.
        """
        # 1. Settings: the checkpoint's or the argument's, then the keyword arguments
        settings = resolve_settings(generation_config or self.generation_config, kwargs)
        if settings.stage == "full" and not self.config.has_plan:
            settings = resolve_settings(settings, {"stage": "execution"})
        segment_limits(self.config, settings)
        # 2. The prompt: the question, and the plan where it is given
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        check_prompt(self.config, settings, input_ids, attention_mask, plan_ids, streamer)
        prompt = input_ids
        prompt_segments = torch.where(attention_mask.bool(), QUESTION, PADDING)
        if plan_ids is not None:
            plan, plan_segments = lay_out_plan(self.config, plan_ids.to(input_ids.device))
            prompt = torch.cat([prompt, plan], dim=1)
            prompt_segments = torch.cat([prompt_segments, plan_segments], dim=1)
        # 3. Denoise until every row has ended
        if streamer is not None:
            streamer.put(input_ids.cpu())
        from .orders_hierbd3lm import denoiser_class  # here, as that file builds on this one

        denoiser = denoiser_class(self.config, settings)(self, settings, prompt, prompt_segments, streamer)
        denoiser.run()
        if streamer is not None:
            streamer.end()
        # 4. Gather what was written
        return denoiser.output(input_ids)

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: loads generation_config.json as our own class, where there is one."""
        if generation_config is not None:
            self.generation_config = resolve_settings(generation_config, {})
            return
        # Fields of the model's configuration may be among them; the generation configuration refuses what it lacks.
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name in (*DOWNLOAD_ARGUMENTS, "_commit_hash", *_settings())
        }
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            logger.info("No generation_config.json found: the default generation settings are used.")


def resolve_settings(base: GenerationConfig, overrides: dict[str, Any]) -> HierBD3LMGenerationConfig:
    """The settings of `base` with some overridden, checked."""
    missing = [name for name in _settings() if not hasattr(base, name)]
    if missing:
        raise ValueError(
            f"`generation_config` must be a HierBD3LMGenerationConfig, but {type(base).__name__} was given"
        )
    return HierBD3LMGenerationConfig(**({name: getattr(base, name) for name in _settings()} | overrides))


def segment_limits(config: Any, settings: HierBD3LMGenerationConfig) -> tuple[int, int]:
    """Most tokens of plan and execution.

    Raises:
        ValueError: if a limit is over the model's, or no whole number of blocks.
    """

    def limit(segment: str) -> int:
        wanted = getattr(settings, f"max_{segment}_len")
        most = getattr(config, f"{segment}_len")
        block_size = 1 if config.is_flat else getattr(config, f"{segment}_block_size")
        if wanted is None or (segment == "plan" and settings.stage == "execution"):
            return most  # a given plan is never cut
        if not block_size <= wanted <= most or wanted % block_size:
            raise ValueError(
                f"`max_{segment}_len` must be a multiple of the block size {block_size} up to {most}, but got {wanted}"
            )
        if wanted < 2:
            raise ValueError(f"`max_{segment}_len` must be at least 2, the opener and a token, but got {wanted}")
        return wanted

    limits = limit("plan"), limit("execution")
    if config.is_flat and sum(limits) % config.plan_block_size:
        raise ValueError(
            f"`max_plan_len + max_execution_len` must be a multiple of the block size {config.plan_block_size}, but "
            f"got {' + '.join(map(str, limits))}"
        )
    return limits


def check_prompt(
    config: Any,
    settings: HierBD3LMGenerationConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    plan_ids: torch.Tensor | None,
    streamer: BaseStreamer | None,
) -> None:
    """Checks what `generate` is given."""
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`input_ids` and `attention_mask` must have one shape (batch, length), but got "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )
    longest = int(attention_mask.sum(dim=1).amax()) if input_ids.numel() else 0
    if longest > config.question_len:
        raise ValueError(f"`input_ids` must have at most question_len={config.question_len} tokens, but got {longest}")
    if (settings.stage == "execution" and config.has_plan) != (plan_ids is not None):
        model = "" if config.has_plan else " of a model without a plan (`plan_len=0`)"
        raise ValueError(
            f"`plan_ids` must be given for stage='execution' of a model with a plan and for no other, but got "
            f"stage={settings.stage!r}{model} {'without' if plan_ids is None else 'with'} plan_ids"
        )
    if plan_ids is not None and (plan_ids.ndim != 2 or len(plan_ids) != len(input_ids)):
        raise ValueError(
            f"`plan_ids` must be (batch, length) with batch {len(input_ids)}, got {tuple(plan_ids.shape)}"
        )
    if streamer is not None and len(input_ids) != 1:
        raise ValueError(f"`streamer` must be None for more than one row, but got {len(input_ids)} rows")


def lay_out_plan(config: Any, plan_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Plans of `(batch, length)` as whole segments: opener, content, `<|end|>` to the end of the last block, padding.

    In a flat order, in which no block ends with the plan, there is one `<|end|>`.

    Returns:
        tokens and segment ids, `torch.LongTensor` of shape `(batch, longest)`.

    Raises:
        ValueError: for a plan that is not right-padded, is too long, or holds a mask or an execution opener.
    """
    if plan_ids.shape[1] and (plan_ids[:, 0] == config.plan_token_id).all():
        plan_ids = plan_ids[:, 1:]
    outside = (plan_ids == config.pad_token_id) | (plan_ids == config.end_token_id)
    content = outside.cumsum(dim=1) == 0
    if (~content & ~outside).any():
        raise ValueError("`plan_ids` must be padded on the right, but a token follows a pad or end token")
    for role in ("mask", "plan", "execution"):
        if (plan_ids == getattr(config, f"{role}_token_id")).any():
            raise ValueError(f"`plan_ids` must hold a plan's content only, but got the {role} token inside it")
    length, block_size = content.sum(dim=1), config.plan_multiple
    if (length > config.plan_len - 1).any():
        raise ValueError(
            f"`plan_ids` must have at most plan_len - 1 = {config.plan_len - 1} tokens, but got {int(length.amax())}"
        )
    total = (length + 1 + block_size) // block_size * block_size  # ceil((1 + length + 1) / block_size) blocks
    total = total.clamp(max=config.plan_len)  # a plan that generate() cut at its limit has no `<|end|>`
    columns = torch.arange(int(total.amax()), device=plan_ids.device)
    tokens = torch.where(columns < total[:, None], config.end_token_id, config.pad_token_id)
    tokens[:, 0] = config.plan_token_id
    tokens[:, 1 : plan_ids.shape[1] + 1][content[:, : len(columns) - 1]] = plan_ids[content]
    return tokens, torch.where(columns < total[:, None], PLAN, PADDING)


def never_written(config: Any) -> torch.LongTensor:
    """Ids that no block can hold: the mask token (SUBS), and those by which a reader tells segments and padding."""
    ids = {config.mask_token_id, config.plan_token_id, config.execution_token_id, config.pad_token_id}
    return torch.tensor(sorted(ids - {config.end_token_id}))


def left_justify(tokens: torch.LongTensor, keep: torch.BoolTensor, pad_token_id: int) -> torch.LongTensor:
    """The kept tokens of each row side by side, right-padded: `(batch, most kept)`."""
    order = (~keep).long().argsort(dim=1, stable=True)
    count = keep.sum(dim=1, keepdim=True)
    columns = torch.arange(int(count.amax()), device=tokens.device)
    return tokens.gather(1, order)[:, : len(columns)].masked_fill(columns >= count, pad_token_id)


def sample_tokens(
    logits: torch.FloatTensor, temperature: float, top_p: float, generator: torch.Generator
) -> torch.LongTensor:
    """Draws one token for each row of `logits` of shape `(num_tokens, vocab_size)`; greedy at temperature 0.

    By the Gumbel-max trick in float64: in float32 the noise is truncated, which lowers the temperature unnoticed
    (Zheng et al. 2024, section 4).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = TemperatureLogitsWarper(float(temperature))(None, logits.double())
    if top_p < 1:
        scores = TopPLogitsWarper(float(top_p))(None, scores)
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=torch.float64)
    return (scores - torch.log(-torch.log(uniform))).argmax(dim=-1)


def accept_adaptively(
    candidates: torch.BoolTensor,
    logits: torch.FloatTensor,
    tokens: torch.LongTensor,
    settings: HierBD3LMGenerationConfig,
) -> torch.BoolTensor:
    """Which candidates the model is sure of, by its plain probabilities: `(rows, width)`.

    Args:
        candidates (`torch.BoolTensor` of shape `(rows, width)`): tokens that may be revealed.
        logits (`torch.FloatTensor` of shape `(num_candidates, vocab_size)`), tokens (`(num_candidates,)`).
    """
    probabilities = logits.softmax(dim=-1)
    if settings.sampler == "confidence":
        doubt = -probabilities.gather(-1, tokens[:, None])[:, 0]
    else:
        doubt = torch.special.entr(probabilities).sum(dim=-1)
    doubt = torch.full(candidates.shape, torch.inf, device=doubt.device).masked_scatter(candidates, doubt)
    key = (~candidates).long() if settings.left_to_right else doubt
    order = key.argsort(dim=1, stable=True)
    doubt = doubt.gather(1, order)
    if settings.sampler == "confidence":
        sure = (doubt < -settings.threshold).cumprod(dim=1).bool()
    else:
        # The joint's divergence from the product of marginals is at most the sum of all entropies but the largest.
        sure = doubt.cumsum(dim=1) - doubt.cummax(dim=1).values <= settings.entropy_bound
    rank = torch.arange(doubt.shape[1], device=doubt.device)
    sure = sure | (rank < settings.tokens_per_step)
    return candidates & torch.zeros_like(candidates).scatter(1, order, sure)
