"""The collator, which lays out question, plan and execution as the tokens of a batch."""

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig
from ..masking_hierbd3lm import EXECUTION, PADDING, PLAN, QUESTION
from ..order_hierbd3lm import BlockOrder, check_graph, total_order
from .questions import encode_questions, encode_text, encode_texts
from .steps import split_steps

SEGMENTS = ("question", "plan", "execution")  # in the order of a sequence
ID_KEYS = tuple(f"{segment}_ids" for segment in SEGMENTS)
IGNORED_LABEL = -100
GIVEN_LABEL = -101  # until the batch is made: a token that is not predicted

STEP_KEYS = ("step_lengths", "depends_on")  # of an example whose execution follows its plan
STEP_ENDS = "\n"  # what separates steps, and belongs to the one before

ExampleIds = Mapping[str, Any]  # `question_ids`, `plan_ids`, `execution_ids`, optionally `continues`, `STEP_KEYS`


class Columns(NamedTuple):
    """Consecutive columns of one row."""

    tokens: list[int]
    segment_ids: list[int]
    labels: list[int]


class HierarchicalDataCollator:
    """Collate examples into model inputs.

    An example is a dict with `question_ids`, `plan_ids`, `execution_ids` (content only: no openers, no `<|end|>`; see
    [`encode_example`]), or with the texts `question`, `plan`, `execution`, or with `text` alone. If an example with
    ids also has `continues=True`, its execution is a piece of a longer text that continues in another row: it gets no
    closing `<|end|>` and no filler, and an `<|end|>` among its tokens closes a document. With
    `plan_is_given=True` the plan of an example is not predicted.

    With `execution_order="plan"` an example with ids has `step_lengths` and `depends_on` too, one with texts may have
    `execution_steps` and `depends_on`; see [`cut_steps`]. Each step, and the answer after them, is laid out with an
    opener and an `<|end|>` of its own.

    Args:
        config: lengths, block sizes and special token ids.
        tokenizer: encodes texts; not needed for ids.
        fixed_length: pad every segment to its maximum length (`config.question_len`, `plan_len`, `execution_len`)
            instead of the longest in the batch.
        auto_split: split an example that has only a `text` into question, plan and execution at 25 % and 50 % of its
            tokens.

    Returns (when called with a list of examples):
        `torch.LongTensor`s of shape `(batch, length)`. Questions are left-padded, so that all plans start in the same
        column. The rest is right-padded: each segment separately if `fixed_length` is set, else as a whole.

        - `input_ids`: padding is `config.pad_token_id`.
        - `segment_ids`: question 0, plan 1, execution 2, padding -1.
        - `block_ids`: question 0, plan blocks 1 to P, execution blocks P + 1 to P + E, padding -1; for other orders
          see [`~order_hierbd3lm.BlockOrder.layout`].
        - `position_ids`: 0 at the first real token, 0 on padding.
        - `sees`, a `torch.BoolTensor` of shape `(batch, parts, parts)`, only with `execution_order="plan"`: see
          [`~order_hierbd3lm.BlockOrder.see_steps`].
        - `labels`: the token itself where the likelihood counts it (content and first `<|end|>` of plan and execution;
          all tokens but the opener if the execution continues), else -100.
        - `is_given`: a `torch.BoolTensor`, true for the tokens of given plans; only if there are any.

    Raises (when called):
        ValueError: if an example lacks a key, exceeds the configured lengths, or contains a special token.
    """

    def __init__(
        self,
        config: HierBD3LMConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        fixed_length: bool = False,
        auto_split: bool = False,
    ):
        self.config, self.order = config, BlockOrder.from_config(config)
        self.tokenizer = tokenizer
        self.fixed_length = fixed_length
        self.auto_split = auto_split

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [self._read_ids(feature) for feature in features]
        for example in examples:
            _check_ids(example, self.config)
            check_content(example, self.config)
            check_lengths(example, self.config)
        rows = self._pad_rows([_lay_out_segments(example, self.config, self.order) for example in examples])
        input_ids, segment_ids, labels = (torch.tensor(column, dtype=torch.long) for column in zip(*rows, strict=True))
        block_ids, position_ids = self.order.layout(segment_ids, input_ids)
        is_given = labels == GIVEN_LABEL
        batch = {
            "input_ids": input_ids,
            "segment_ids": segment_ids,
            "block_ids": block_ids,
            "position_ids": position_ids,
            "labels": labels.masked_fill(is_given, IGNORED_LABEL),
        }
        if self.order.follows_plan:
            batch["sees"] = torch.stack([self.order.see_steps(example["depends_on"]) for example in examples])
        return batch | {"is_given": is_given} if is_given.any() else batch

    def _read_ids(self, feature: dict[str, Any]) -> ExampleIds:
        if all(key in feature for key in ID_KEYS):
            ids = {key: _read_tokens(key, feature[key]) for key in ID_KEYS}
            if self.order.follows_plan:
                ids |= read_steps(feature)
            return ids | {name: bool(feature.get(name)) for name in ("continues", "plan_is_given")}
        if self.tokenizer is None:
            raise ValueError(
                f"an example must have the keys {', '.join(ID_KEYS)} if the collator has no `tokenizer`, "
                f"but got {', '.join(feature)}"
            )
        ids = encode_example(feature, self.tokenizer, self.auto_split, self.config.chat_template)
        return ids | cut_steps(feature, self.tokenizer) if self.order.follows_plan else ids

    def _pad_rows(self, rows: list[list[Columns]]) -> list[Columns]:
        config = self.config
        question_width = config.question_len if self.fixed_length else max(len(row[0].tokens) for row in rows)
        longest = max(sum(len(segment.tokens) for segment in row[1:]) for row in rows)
        total = config.plan_len + config.execution_len if self.fixed_length else longest
        padded = []
        for question, plan, execution in rows:
            # If the execution's opener is predicted, no padding may separate plan and execution: pad them together.
            pads_plan = self.fixed_length and not self.order.predicts_execution_opener
            after_plan = config.plan_len - len(plan.tokens) if pads_plan else 0
            after_execution = total - len(plan.tokens) - after_plan - len(execution.tokens)
            before_question = _padding(question_width - len(question.tokens), config)
            pieces = [before_question, question, plan, _padding(after_plan, config)]
            pieces += [execution, _padding(after_execution, config)]
            padded.append(Columns(*(list(chain.from_iterable(ids)) for ids in zip(*pieces, strict=True))))
        return padded


def encode_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    auto_split: bool = False,
    chat_template: bool = False,
) -> dict[str, list[int]]:
    """Encode the texts of an example; see [`encode_examples`]."""
    return encode_examples([example], tokenizer, auto_split, chat_template)[0]


def encode_examples(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    auto_split: bool = False,
    chat_template: bool = False,
) -> list[dict[str, list[int]]]:
    """Encode the texts of each example as `question_ids`, `plan_ids`, `execution_ids`.

    Questions are encoded by [`encode_questions`], through the tokenizer's chat template if `chat_template` is set.
    Plan and execution are encoded without special tokens. A plan may be empty or None. With `auto_split`, an example
    that has a `text` and none of the three is split at 25 % and 50 % of its tokens.

    Raises:
        ValueError: if an example lacks a key, or a value is not a string.
    """
    is_one_text = [
        auto_split and "text" in example and not any(segment in example for segment in SEGMENTS)
        for example in examples
    ]
    texts = [_read_texts(example) for example, is_one in zip(examples, is_one_text, strict=True) if not is_one]
    questions, plans, executions = map(list, zip(*texts, strict=True)) if texts else ([], [], [])
    encoded = zip(
        encode_questions(questions, tokenizer, chat_template),
        encode_texts(plans, tokenizer, add_special_tokens=False),
        encode_texts(executions, tokenizer, add_special_tokens=False),
        strict=True,
    )
    return [
        split_text(example["text"], tokenizer) if is_one else dict(zip(ID_KEYS, next(encoded), strict=True))
        for example, is_one in zip(examples, is_one_text, strict=True)
    ]


def _read_texts(example: Mapping[str, Any]) -> tuple[str, str, str]:
    missing = [segment for segment in SEGMENTS if segment not in example]
    if missing:
        hint = "; `auto_split=True` splits a `text` alone" if "text" in example and len(missing) == 3 else ""
        raise ValueError(
            f"an example must have the keys {', '.join(SEGMENTS)}, but lacks {', '.join(missing)} among "
            f"{', '.join(example)}{hint}"
        )
    texts = tuple("" if name == "plan" and example[name] is None else example[name] for name in SEGMENTS)
    for name, text in zip(SEGMENTS, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must be a string, but got {text!r}")
    return texts


def cut_steps(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """Cut the tokens of an execution into steps and answer, for `execution_order="plan"`.

    Args:
        example: `execution`, optionally `execution_steps` (else the lines before `####`), and optionally `depends_on`
            (for each step the earlier steps that it needs, counted from 0; else all of them).

    Returns:
        `step_lengths`: tokens of each step, with the line end after it, then those of the answer; and `depends_on`.

    Raises:
        ValueError: if the execution does not hold its steps in order, or `depends_on` has another number of them.
    """
    if "execution" not in example:
        raise ValueError(
            f"an example must have an `execution` for execution_order='plan', but has {', '.join(example)}"
        )
    execution, end = example["execution"], 0
    steps = example.get("execution_steps")
    steps, ends = split_steps(execution) if steps is None else steps, []
    for step in (step.strip(STEP_ENDS) for step in steps):  # an empty line belongs to the step before it
        start = execution.find(step, end)
        if start < 0:
            raise ValueError(f"`execution` must hold the steps of `execution_steps` in order, but lacks {step!r}")
        end = start + len(step)
        end += len(execution[end:]) - len(execution[end:].lstrip(STEP_ENDS))
        ends.append(end)
    depends_on = example.get("depends_on")
    depends_on = total_order(len(steps)) if depends_on is None else [list(earlier) for earlier in depends_on]
    if len(depends_on) != len(steps):
        raise ValueError(f"`depends_on` must have a list for each of {len(steps)} steps, but got {len(depends_on)}")
    check_graph(depends_on)
    if not tokenizer.is_fast:
        raise ValueError("`tokenizer` must be a fast one for execution_order='plan', whose steps are cut from a text")
    encoded = tokenizer(execution, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # some tokenizers give the end of a line an empty span after it
    starts = [start - (start == stop) for start, stop in encoded["offset_mapping"]]
    number_of_token = [bisect_right(ends, start) for start in starts]
    counts = Counter(number_of_token)
    return {"step_lengths": [counts[number] for number in range(len(steps) + 1)], "depends_on": depends_on}


def read_steps(feature: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `step_lengths` and `depends_on` of an encoded example, checked."""
    if missing := [key for key in STEP_KEYS if key not in feature]:
        raise ValueError(
            f"an example must have {', '.join(missing)} for execution_order='plan': see `prepare_dataset`"
        )
    lengths = [int(length) for length in feature["step_lengths"]]
    depends_on = [[int(other) for other in earlier] for earlier in feature["depends_on"]]
    if sum(lengths) != len(feature["execution_ids"]) or len(lengths) != len(depends_on) + 1:
        raise ValueError(
            f"`step_lengths` must be those of {len(depends_on)} steps and of the answer, "
            f"{len(feature['execution_ids'])} tokens in all, but got {lengths}"
        )
    if feature.get("continues"):
        raise ValueError("`continues` must be False for execution_order='plan', but got True")
    return {"step_lengths": lengths, "depends_on": depends_on}


def split_text(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Split a text into question (first quarter of its tokens), plan (second quarter) and execution (the rest)."""
    ids = encode_text(text, tokenizer, add_special_tokens=True)
    quarter = len(ids) // 4
    parts = ids[:quarter], ids[quarter : 2 * quarter], ids[2 * quarter :]
    return dict(zip(ID_KEYS, parts, strict=True))


def collate_questions(question_ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Left-pad questions for `generate`.

    Returns:
        `input_ids`, `attention_mask`: two `torch.LongTensor`s of shape `(batch, longest)`.
    """
    longest = max(map(len, question_ids), default=0)
    padding = [longest - len(ids) for ids in question_ids]
    rows = zip(padding, question_ids, strict=True)
    return {
        "input_ids": torch.tensor([[pad_token_id] * left + list(ids) for left, ids in rows], dtype=torch.long),
        "attention_mask": torch.tensor([[0] * left + [1] * (longest - left) for left in padding], dtype=torch.long),
    }


def empty_question(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of an empty question: the tokenizer's special tokens, such as BOS."""
    return encode_example({"question": "", "plan": "", "execution": ""}, tokenizer)["question_ids"]


def segment_lengths(example: ExampleIds, config: HierBD3LMConfig) -> dict[str, int]:
    """Return the number of tokens that count towards each segment's limit.

    Plan and execution include their opener and one `<|end|>`. The plan's length is 0 if neither the model nor the
    example has a plan; an execution that continues has no `<|end|>`. Each step has an opener and an `<|end|>`.
    """
    question, plan, execution = (len(example[key]) for key in ID_KEYS)
    needs_plan = config.plan_len > 0 or plan > 0
    around = 2 * len(example["step_lengths"]) if "step_lengths" in example else 2 - bool(example.get("continues"))
    return {"question": question, "plan": (1 + plan + 1) * needs_plan, "execution": around + execution}


def counted_tokens(example: ExampleIds, config: HierBD3LMConfig) -> dict[str, int]:
    """Return the number of plan and execution tokens that the likelihood counts: all but openers and given plans."""
    lengths, openers = segment_lengths(example, config), {"execution": len(example.get("step_lengths", (0,)))}
    if example.get("plan_is_given"):
        lengths["plan"] = 0
    return {segment: max(lengths[segment] - openers.get(segment, 1), 0) for segment in ("plan", "execution")}


def over_long_segments(example: ExampleIds, config: HierBD3LMConfig) -> list[str]:
    """Return the names of the segments that exceed their configured length."""
    lengths = segment_lengths(example, config)
    over_long = [segment for segment, length in lengths.items() if length > getattr(config, f"{segment}_len")]
    return (
        over_long
        if "execution" in over_long or not has_over_long_steps(example, config)
        else [*over_long, "execution"]
    )


def has_over_long_steps(example: ExampleIds, config: HierBD3LMConfig) -> bool:
    """Return True if an execution that follows the plan has too many steps, or too long ones."""
    if "step_lengths" not in example:
        return False
    steps, length = example["step_lengths"], config.step_len
    return max(steps) + 2 > length or len(steps) > config.execution_len // length


def example_length(example: ExampleIds, config: HierBD3LMConfig) -> int:
    """Return the length of the laid-out example, with plan and execution filled up to whole blocks."""
    return sum(len(segment.tokens) for segment in _lay_out_segments(example, config, BlockOrder.from_config(config)))


def check_lengths(example: ExampleIds, config: HierBD3LMConfig) -> None:
    """Raise a ValueError if a segment is too long; the message names the segment, its length and the limit."""
    for segment in over_long_segments(example, config):
        if segment == "execution" and has_over_long_steps(example, config):
            raise ValueError(
                f"`execution` must have at most {config.execution_len // config.step_len - 1} steps and an answer of "
                f"at most step_len={config.step_len} tokens each, including opener and <|end|>, but got "
                f"{[length + 2 for length in example['step_lengths']]}"
            )
        limit, length = getattr(config, f"{segment}_len"), segment_lengths(example, config)[segment]
        counted = "" if segment == "question" else ", including opener and <|end|>"
        raise ValueError(f"`{segment}` must have at most {segment}_len={limit} tokens{counted}, but got {length}")


def _check_ids(example: ExampleIds, config: HierBD3LMConfig) -> None:
    """Raise a ValueError for an id that is no row of the embedding matrix."""
    vocab_size = config.vocab_size  # read once: an attribute of a configuration takes microseconds
    for key in ID_KEYS:
        if outside := [token for token in example[key] if not 0 <= token < vocab_size]:
            raise ValueError(f"`{key}` must be ids in [0, {vocab_size}), but got {outside[0]}")


def _read_tokens(key: str, value: Any) -> list[int]:
    """Return token ids of a list, an array or a tensor."""
    try:
        tokens = [operator.index(token) for token in value]
    except TypeError as error:
        raise ValueError(f"`{key}` must be a list of token ids, but got {value!r}") from error
    return tokens


def check_content(example: ExampleIds, config: HierBD3LMConfig) -> None:
    """Raise a ValueError if the content contains a special token, which would be read as structure.

    A question may contain the pad token, unless it is also `<|end|>`: some tokenizers pad with their BOS token. An
    execution that continues may contain `<|end|>`, which closes a document.
    """
    special = {getattr(config, f"{role}_token_id"): role for role in ("pad", *SPECIAL_TOKENS)}
    for segment, key in zip(SEGMENTS, ID_KEYS, strict=True):
        found = special.keys() & set(example[key])
        if segment == "question":
            found -= {config.pad_token_id} - {config.end_token_id}
        if segment == "execution" and example.get("continues"):
            found -= {config.end_token_id}
        if found:
            names = ", ".join(f"{special[token]} ({token})" for token in sorted(found))
            raise ValueError(f"`{key}` must not contain special tokens, but got {names}")


def has_special_token(example: ExampleIds, config: HierBD3LMConfig) -> bool:
    """Return True if [`check_content`] rejects the example."""
    try:
        check_content(example, config)
    except ValueError:
        return True
    return False


def _lay_out_segments(example: ExampleIds, config: HierBD3LMConfig, order: BlockOrder) -> list[Columns]:
    """Return the columns of question, plan and execution, without padding."""
    question, plan, execution = (list(example[key]) for key in ID_KEYS)
    lengths, end, continues = segment_lengths(example, config), [config.end_token_id], bool(example.get("continues"))
    fillers = order.fillers({PLAN: lengths["plan"], EXECUTION: lengths["execution"]})
    no_plan, opener = Columns([], [], []), config.execution_token_id
    if "step_lengths" in example:
        tokens = iter(execution)
        steps = [list(islice(tokens, length)) for length in example["step_lengths"]]
        filled = [end * (-(2 + len(step)) % config.execution_block_size) for step in steps]
        laid_out = [
            _lay_out_segment(opener, step + end, *more, EXECUTION) for step, *more in zip(steps, filled, strict=True)
        ]
        execution_columns = Columns(*(list(chain.from_iterable(ids)) for ids in zip(*laid_out, strict=True)))
    else:
        filler = end * fillers[EXECUTION] * (not continues)
        execution_columns = _lay_out_segment(opener, execution + end * (not continues), filler, EXECUTION)
    plan_filler = end * fillers[PLAN]
    columns = [
        Columns(question, [QUESTION] * len(question), [IGNORED_LABEL] * len(question)),
        _lay_out_segment(config.plan_token_id, plan + end, plan_filler, PLAN) if lengths["plan"] else no_plan,
        execution_columns,
    ]
    if example.get("plan_is_given"):
        columns[1].labels[:] = [GIVEN_LABEL] * len(columns[1].labels)
        columns[2].labels[0] = GIVEN_LABEL  # the opener, which some orders predict
    return columns


def _lay_out_segment(opener: int, counted: list[int], filler: list[int], segment: int) -> Columns:
    tokens = [opener, *counted, *filler]
    labels = [IGNORED_LABEL, *counted] + [IGNORED_LABEL] * len(filler)
    return Columns(tokens, [segment] * len(tokens), labels)


def _padding(length: int, config: HierBD3LMConfig) -> Columns:
    return Columns([config.pad_token_id] * length, [PADDING] * length, [IGNORED_LABEL] * length)
