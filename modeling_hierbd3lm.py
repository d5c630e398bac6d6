"""The hierarchical block diffusion model: any causal decoder of transformers, run under the hierarchical mask."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput, can_return_tuple

from .backbones_hierbd3lm import (
    add_special_tokens,
    check_backbone,
    check_backbone_config,
    check_backbone_signature,
    check_positions,
    check_tied_as_loaded,
    hide_local_path,
    load_autoregressive,
    special_token_ids,
    take_text_part,
    vocabulary_size,
)
from .cache_hierbd3lm import BlockCache, grouping
from .configuration_hierbd3lm import HierBD3LMConfig, config_fields, refuse_misspelt_fields
from .diffusion_hierbd3lm import TOKEN_LOSSES, masked_nll
from .generation_hierbd3lm import HierBD3LMGenerationMixin
from .masking_hierbd3lm import (
    CLEAN,
    EXECUTION,
    NOISY,
    PADDING,
    PLAN,
    QUESTION,
    PackedRows,
    TokenLayout,
    needed_tokens,
    render_mask,
)
from .order_hierbd3lm import BlockOrder
from .settings_hierbd3lm import HierBD3LMGenerationConfig

# 256 MiB in float32 on a CPU, 512 MiB elsewhere: reading the weights of the head does not dominate. A batch that fits
# does not compute its logits twice.
LOGITS_AT_ONCE = {"cpu": 2**26, "others": 2**27}
NEW_EMBEDDING_NOISE = 0.02  # of the old rows' standard deviation, so that no two new tokens are the same
OPENING_WORDS = {"plan": "Plan:\n", "execution": "Solution:\n"}  # whose rows the openers start from


@dataclass
class HierBD3LMOutput(ModelOutput):
    """
    Args:
        logits (`torch.FloatTensor` of shape `(batch, length, vocab_size)`, or `(num_true, vocab_size)`):
            Logits of the noisy tokens, wherever they are predicted; with a bool `logits_to_keep` of its true positions
            in row-major order. Without a noisy stream, those of the hidden states of `input_ids`.
        nll (`torch.FloatTensor` of shape `(num_true,)`):
            Instead of logits if `target_ids` are given: -log p of the clean tokens in nats (for SEDD their score
            entropy).
        hidden_states, attentions (tuples of `torch.FloatTensor`, *optional*):
            Of the backbone, over its `[clean | noisy]` input.
    """

    logits: torch.FloatTensor | None = None
    nll: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class HierBD3LMForBlockDiffusion(PreTrainedModel, HierBD3LMGenerationMixin):
    """A decoder of `AutoModelForCausalLM`, `self.backbone`, that denoises a plan and then an execution."""

    config: HierBD3LMConfig
    generation_config_class = HierBD3LMGenerationConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # All ties are the backbone's, and peft looks for those only where this is a dict.
    _tied_weights_keys = {}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HierBD3LMConfig):
        super().__init__(config)
        check_backbone_config(config.backbone_config)
        check_positions(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        check_backbone_signature(self.backbone)
        self.order = BlockOrder.from_config(config)
        self.post_init()
        if self.device.type != "meta":  # a checkpoint is loaded into a model on that device
            check_backbone(self)

    @classmethod
    def from_autoregressive(
        cls, model_or_path: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> "HierBD3LMForBlockDiffusion":
        """Wrap an open autoregressive checkpoint: every weight is kept, only the special tokens' rows are new.

        A new row is a mean of old ones plus a little noise from torch's global generator: `<|end|>` starts from the
        checkpoint's EOS token, an opener from the words that it stands for, all else from the mean of all rows.

        Args:
            model_or_path: a causal language model of transformers, or what its `from_pretrained` takes, or a GGUF
                file, which is dequantized. A loaded one becomes the backbone itself, not a copy. Of a multimodal model
                the text part is taken.
            tokenizer: the checkpoint's tokenizer. The special tokens that it lacks are added to it, in place.
            kwargs: fields of [`HierBD3LMConfig`]; and `dtype`, `attn_implementation`, `revision`, ... for
                `from_pretrained`. `prediction` is "shifted" and `question_attention` "causal" by default: with blocks
                of one token the model is the checkpoint. `chat_template` is True if the tokenizer has one.

        Raises:
            ValueError: if the architecture cannot run under the hierarchical mask; the message says why.
        """
        known = config_fields().keys() - {"backbone_config"}
        refuse_misspelt_fields(kwargs)
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        defaults = {"prediction": "shifted", "question_attention": "causal"}
        fields = defaults | {"chat_template": bool(tokenizer.chat_template)} | fields
        if isinstance(model_or_path, PreTrainedModel):
            if kwargs:
                raise ValueError(f"`kwargs` must be fields of HierBD3LMConfig for a loaded model, but got {[*kwargs]}")
            backbone = model_or_path
        else:
            backbone = load_autoregressive(model_or_path, **kwargs)
        backbone = take_text_part(backbone)
        hide_local_path(backbone.config)
        check_backbone_config(backbone.config)
        check_backbone_signature(backbone)
        check_tied_as_loaded(fields.get("tie_word_embeddings"), backbone)
        num_added = add_special_tokens(tokenizer)
        num_rows = max(len(tokenizer), backbone.get_input_embeddings().weight.shape[0])
        if vocabulary_size(tokenizer) > num_rows:
            raise ValueError(
                f"`tokenizer` must have ids below {num_rows}, as the checkpoint has no rows for others, but got "
                f"{vocabulary_size(tokenizer) - 1}"
            )
        add_token_rows(backbone, len(tokenizer) - num_added, tokenizer)
        config = HierBD3LMConfig(
            backbone_config=backbone.config,
            attn_implementation=backbone.config._attn_implementation,  # else the outer default would replace it
            **(special_token_ids(tokenizer) | fields),
        )
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        model.train(backbone.training)
        check_backbone(model)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        noisy_input_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        block_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        example_ids: torch.LongTensor | None = None,
        row_ids: torch.LongTensor | None = None,
        sees: torch.BoolTensor | None = None,
        logits_to_keep: torch.BoolTensor | None = None,
        target_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> HierBD3LMOutput:
        r"""
        Run one pass over `[clean x0 | noisy xt]` under the hierarchical mask; for an autoregressive model over x0,
        with the backbone's causal mask.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Clean tokens x0: question, plan, execution.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                0 on padding; read only when neither `segment_ids` nor `block_ids` are given, and by `ar`.
            noisy_input_ids (`torch.LongTensor` of shape `(batch, noisy_length)`, *optional*):
                Noisy tokens xt, the noisy copy of `input_ids`, column by column; the copy of question and padding is
                ignored. Shape `(batch, copies, length)` holds several noisy copies, which do not see each other.
            segment_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                0 question, 1 plan, 2 execution, -1 padding. Read from `<|plan|>` and `<|execution|>` if omitted.
            block_ids, position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Rank of each token's block (-1 on padding) and its position; derived from the segments if omitted.
            example_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Example of each token, in packed rows; these need `block_ids` and `position_ids`.
            row_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Packs the examples of the batch, one per row of `input_ids`, into fewer rows for the pass: those with
                the same number share a row, without padding between them. Needs `logits_to_keep`.
            sees (`torch.BoolTensor` of shape `(batch, parts, parts)`, *optional*):
                With `execution_order="plan"` which parts each part of an example sees, as
                [`HierarchicalDataCollator`] returns it.
            logits_to_keep (`torch.BoolTensor` of the shape of `noisy_input_ids`, *optional*):
                Noisy tokens whose logits are computed. If there is no noisy stream, positions of `input_ids` whose
                hidden states are projected: with `prediction="shifted"` those before the predicted tokens.
            target_ids (`torch.LongTensor` of the shape of `noisy_input_ids`, *optional*):
                Clean tokens of those positions. The output then holds the NLL of those at `logits_to_keep` and no
                logits, which are computed in chunks and discarded.
        """
        if kwargs.pop("labels", None) is not None:
            raise ValueError(
                "`labels` must be left out of the batch, as `forward` has no loss: `HierBD3LMTrainer` trains on the "
                "NELBO, and `evaluation.likelihood.measure_likelihood` measures it"
            )
        if target_ids is not None and logits_to_keep is None:
            raise ValueError("`logits_to_keep` must be given together with `target_ids`, but got None")
        if row_ids is not None and (logits_to_keep is None or example_ids is not None):
            raise ValueError("`row_ids` must be given with `logits_to_keep` and without `example_ids`")
        if self.order.follows_plan != (sees is not None):
            raise ValueError(
                f"`sees` must be given for execution_order='plan' and for no other, but got "
                f"{None if sees is None else tuple(sees.shape)} for {self.config.execution_order!r}"
            )
        if noisy_input_ids is None:
            kept = None if logits_to_keep is None else logits_to_keep.flatten().nonzero()[:, 0]
            if target_ids is not None:
                kwargs["targets"] = target_ids[logits_to_keep]
            if self.order.is_causal:
                layout = self._causal_layout(input_ids, attention_mask, segment_ids, position_ids)
            else:
                layout = self._clean_layout(
                    input_ids, attention_mask, segment_ids, block_ids, position_ids, example_ids
                )
            if row_ids is not None:
                rows = PackedRows.of(layout.block_ids != PADDING, row_ids)
                kept = rows.places.flatten()[kept]
                input_ids, layout = rows.pack(input_ids, self.config.pad_token_id), rows.pack_layout(layout)
            elif self.order.is_causal:
                inputs = {"input_ids": input_ids, "position_ids": layout.position_ids, "use_cache": False}
                return self._logits_or_nll(
                    kept, attention_mask=(layout.block_ids != PADDING).long(), **inputs, **kwargs
                )
            return self._logits_or_nll(kept, **self._backbone_inputs(input_ids, layout, sees=sees), **kwargs)
        if self.order.is_causal:
            raise ValueError("`noisy_input_ids` must be None for a model without noise, token by token")
        clean = self._clean_layout(input_ids, attention_mask, segment_ids, block_ids, position_ids, example_ids)
        if noisy_input_ids.ndim == 2:
            noisy_input_ids = noisy_input_ids[:, None]
        keep = torch.ones_like(noisy_input_ids, dtype=torch.bool) if logits_to_keep is None else logits_to_keep
        keep = keep.view(noisy_input_ids.shape)
        if target_ids is not None:
            kwargs["targets"] = target_ids.view(keep.shape)[keep]
        tokens = torch.cat([input_ids, noisy_input_ids.flatten(1)], dim=1)
        layout = clean + self._noisy_copies(clean, noisy_input_ids.shape[1])
        chosen = torch.ones_like(tokens, dtype=torch.bool) if logits_to_keep is None else needed_tokens(layout)
        rows = PackedRows.of(chosen, row_ids)
        kept = rows.places.flatten()[self._predicting(clean.block_ids, keep)]
        tokens, layout = rows.pack(tokens, self.config.pad_token_id), rows.pack_layout(layout)
        output = self._logits_or_nll(kept, **self._backbone_inputs(tokens, layout, sees=sees), **kwargs)
        if logits_to_keep is None:
            output.logits = output.logits.view(len(tokens), -1, output.logits.shape[-1])
        return output

    def encode(
        self,
        tokens: torch.LongTensor,
        layout: TokenLayout,
        cache: BlockCache | None = None,
        order: BlockOrder | None = None,
        sees: torch.BoolTensor | None = None,
    ) -> torch.FloatTensor:
        """Last hidden states `(batch, length, hidden_size)` of a pass over tokens of any layout.

        Args:
            tokens (`torch.LongTensor` of shape `(batch, length)`), layout: clean and noisy tokens.
            cache: finished blocks. A pass reads them and writes to the scratch space only; see [`BlockCache`].
            order: order over the blocks; the model's if omitted.
            sees: which parts each part of a row sees, `(batch, parts, parts)`, where that differs between the rows.
        """
        inputs = self._backbone_inputs(tokens, layout, cache, order, sees)
        if cache is None:
            return self.backbone.base_model(**inputs).last_hidden_state
        with grouping(self.backbone.config):
            body = self._compiled_body if cache.is_compiled else self.backbone.base_model
            return body(**inputs).last_hidden_state

    def masked_nll(
        self, masked: torch.BoolTensor, input_ids: torch.LongTensor, **layout: torch.Tensor
    ) -> torch.Tensor:
        """[`~diffusion_hierbd3lm.masked_nll`] of this model: `(num_masked,)`, in nats."""
        return masked_nll(self, masked, input_ids, self.config.mask_token_id, **layout)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocab_size)` of last hidden states `(..., hidden_size)`, as the backbone computes them.

        The output embeddings with their bias, then the scale and the soft cap that the architecture is known to
        have; [`~backbones_hierbd3lm.check_backbone`] compares them with the backbone's own logits.
        """
        logits, config = self.get_output_embeddings()(hidden_states), self.backbone.config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _clean_layout(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        block_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        example_ids: torch.Tensor | None,
    ) -> TokenLayout:
        if block_ids is None:
            if example_ids is not None:
                raise ValueError("`block_ids` must be given together with `example_ids`, but got None")
            if segment_ids is None:
                segment_ids = self._segments_from_openers(input_ids, attention_mask)
            block_ids, positions = self.order.layout(segment_ids, input_ids)
            position_ids = positions if position_ids is None else position_ids
        elif position_ids is None:
            raise ValueError("`position_ids` must be given together with `block_ids`, but got None")
        return TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids, example_ids)

    def _segments_from_openers(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        in_plan = (input_ids == self.config.plan_token_id).cumsum(dim=1) > 0
        in_execution = (input_ids == self.config.execution_token_id).cumsum(dim=1) > 0
        segment_ids = torch.full_like(input_ids, QUESTION).masked_fill(in_plan, PLAN)
        segment_ids = segment_ids.masked_fill(in_execution, EXECUTION)
        if not (self.order.is_shifted and self.order.has_causal_question) and not (segment_ids > QUESTION).any():
            raise ValueError(
                "`segment_ids` must be given for `input_ids` without `<|plan|>` and `<|execution|>`, but got None: a "
                "question sees itself whole, so that its logits give no likelihood. `hierbd3lm ppl` and "
                "`hierbd3lm lm-eval --model hierbd3lm` measure likelihoods"
            )
        return segment_ids if attention_mask is None else segment_ids.masked_fill(attention_mask == 0, PADDING)

    @staticmethod
    def _noisy_copies(clean: TokenLayout, copies: int) -> TokenLayout:
        block_ids = clean.block_ids.masked_fill(clean.block_ids <= QUESTION, PADDING)  # the question is given
        noisy = replace(clean, block_ids=block_ids)
        return functools.reduce(TokenLayout.__add__, (noisy.in_stream(NOISY + copy) for copy in range(copies)))

    def _predicting(self, block_ids: torch.LongTensor, keep: torch.BoolTensor) -> torch.LongTensor:
        """Places in the flattened `[clean | noisy]` tokens whose hidden states predict the noisy tokens in `keep`.

        Args:
            block_ids (`(batch, length)`), keep (`(batch, copies, length)`).
        """
        row, copy, column = keep.nonzero(as_tuple=True)
        length = keep.shape[2]
        place = (copy + 1) * length + column
        if self.order.is_shifted:
            before = (column - 1).clamp(min=0)  # the first column of a row has none before it
            opens = (column == 0) | (block_ids[row, before] != block_ids[row, column])
            place = torch.where(opens, before, place - 1)
        return row * (keep.shape[1] + 1) * length + place

    def _backbone_inputs(
        self,
        tokens: torch.Tensor,
        layout: TokenLayout,
        cache: BlockCache | None = None,
        order: BlockOrder | None = None,
        sees: torch.BoolTensor | None = None,
    ) -> dict[str, Any]:
        keys = layout if cache is None else layout + cache.layout
        order = self.order if order is None else order
        precedes = order.precedes if sees is None else order.block_table(sees)
        precedes = None if precedes is None else precedes.to(tokens.device)
        return {
            "input_ids": tokens,
            "attention_mask": render_mask(self.backbone.config, layout, keys, self.dtype, precedes),
            "position_ids": layout.position_ids,
            "past_key_values": cache,
            "use_cache": cache is not None,  # explicit, as the backbone builds a cache by default
        }

    @staticmethod
    def _causal_layout(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> TokenLayout:
        """The layout of clean tokens each of which is a block: its mask is causal."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids) if segment_ids is None else segment_ids != PADDING
        block_ids = (attention_mask != 0).cumsum(dim=1)
        position_ids = (block_ids - 1).clamp(min=0) if position_ids is None else position_ids
        block_ids = block_ids.masked_fill(attention_mask == 0, PADDING)
        return TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids)

    def _logits_or_nll(
        self, kept: torch.LongTensor | None, targets: torch.LongTensor | None = None, **kwargs: Any
    ) -> HierBD3LMOutput:
        """Run the backbone with `kwargs`; `targets` are the clean tokens that are predicted at `kept`.

        `kept` are flat places as in [`_predicting`], all of them if None.
        """
        if kept is None:
            outputs = self.backbone(**kwargs)
            return HierBD3LMOutput(outputs.logits, None, outputs.hidden_states, outputs.attentions)
        outputs = self.backbone.base_model(**kwargs)
        hidden_states = outputs.last_hidden_state.flatten(0, 1).index_select(0, kept)  # (num_true, hidden)
        logits = self.project(hidden_states) if targets is None else None
        nll = None if targets is None else self.nll_in_chunks(hidden_states, targets)
        return HierBD3LMOutput(logits, nll, outputs.hidden_states, outputs.attentions)

    def nll_in_chunks(self, hidden_states: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
        """The loss of each token, `(num_tokens,)`, never with more than `LOGITS_AT_ONCE` logits in memory.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(num_tokens, hidden_size)`), targets (`(num_tokens,)`).
        """

        def nll(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            token_loss = TOKEN_LOSSES[self.config.token_loss]
            return token_loss(self.project(hidden_states), targets, self.config.mask_token_id)

        limit = LOGITS_AT_ONCE["cpu" if hidden_states.device.type == "cpu" else "others"]
        rows = max(1, limit // self.config.vocab_size)
        if len(targets) <= rows:
            return nll(hidden_states, targets)
        chunks = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        # A chunk's logits are computed again in the backward pass.
        return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks])

    @functools.cached_property
    def cache_shapes(self) -> list[tuple[int, int, int]]:
        """Number of heads, key size and value size of each caching layer, found by a pass over one token."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            cache = self.backbone.base_model(token, use_cache=True).past_key_values
        return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]

    @functools.cached_property
    def _compiled_body(self) -> Callable[..., Any]:
        return torch.compile(self.backbone.base_model)


def add_token_rows(backbone: PreTrainedModel, first_new: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokens from `first_new` on rows of their own in both embedding matrices, which grow if necessary.

    Tokens before `first_new` that have no row yet get one too, as a tokenizer may have been extended earlier.
    """
    num_rows, length = backbone.get_input_embeddings().weight.shape[0], len(tokenizer)
    start = min(first_new, num_rows)
    if length > num_rows:
        backbone.resize_token_embeddings(length, mean_resizing=False)
    matrices = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    # once if the two are one module; the order decides which noise each row gets
    for embeddings in dict.fromkeys(matrix for matrix in matrices if matrix is not None):
        fill_new_rows(embeddings.weight.data, start, length, kin_of_special_tokens(tokenizer, start))


def kin_of_special_tokens(tokenizer: PreTrainedTokenizerBase, first_new: int) -> dict[int, list[int]]:
    """Return, for special tokens from `first_new` on, the older tokens that say nearly the same."""
    kin = {role: tokenizer(words, add_special_tokens=False)["input_ids"] for role, words in OPENING_WORDS.items()} | {
        "end": [tokenizer.eos_token_id]
    }
    kin = {special_token_ids(tokenizer)[f"{role}_token_id"]: ids for role, ids in kin.items()}
    unknown = {None, tokenizer.unk_token_id}
    return {
        token: ids
        for token, ids in kin.items()
        if token >= first_new and ids and unknown.isdisjoint(ids) and max(ids) < first_new
    }


def fill_new_rows(weight: torch.Tensor, start: int, stop: int, kin: dict[int, list[int]]) -> None:
    """Set rows `start..stop` of an embedding matrix to the mean of their kin or of all rows before, plus noise."""
    old = weight[:start].float()
    new = old.mean(dim=0).repeat(stop - start, 1)
    for token, ids in kin.items():
        new[token - start] = old[ids].mean(dim=0)
    noise = torch.randn(new.shape, device=weight.device) * old.std(dim=0) * NEW_EMBEDDING_NOISE
    weight[start:stop] = (new + noise).to(weight.dtype)


HierBD3LMForBlockDiffusion.register_for_auto_class("AutoModel")
if __name__.startswith("hierbd3lm."):  # not for code that a checkpoint brings along
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(HierBD3LMConfig, HierBD3LMForBlockDiffusion, exist_ok=True)
