"""How plain text becomes rows of tokens: documents side by side and cut, or each on rows of its own.

All of a row is execution: the question is empty, and the model has no plan (`plan_len=0`). `<|execution|>` opens a row
and is given, as the BOS token is elsewhere, so that a whole row has `execution_len - 1` tokens of text. An `<|end|>`
closes every document and is a token like any other. What a likelihood counts are these: the tokens of the documents
and one `<|end|>` for each, whatever the algorithm, and whichever way they are put on rows.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...configuration_hierbd3lm import HierBD3LMConfig
from ..collator import ID_KEYS, check_content, check_lengths, empty_question, example_length

logger = logging.get_logger(__name__)

Documents = Dataset | IterableDataset
Batch = dict[str, list[Any]]

TEXT = "text"  # the column of the documents
WRAPPED_TOGETHER = 1000  # documents: as many as `map` gives at once, streaming or not
TOKEN_FEATURES = Features({"token_ids": List(Value("int64")), "num_bytes": Value("int64")})
ROW_FEATURES = Features(
    {**{key: List(Value("int64")) for key in ID_KEYS}, "continues": Value("bool"), "length": Value("int64")}
)


def prepare_text(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    config: HierBD3LMConfig,
    wrap: bool = True,
    num_proc: int | None = None,
) -> tuple[Documents, dict[str, Any]]:
    """Puts documents on rows for training and evaluation. No token is lost, and none is there twice.

    Args:
        documents: has the column `text`; each of its texts is a document, an empty one too. Special tokens that are
            spelt out in a text stay text.
        wrap: whether `WRAPPED_TOGETHER` documents at a time stand side by side and are cut into whole rows, as MDLM
            and BD3-LM do it: a token attends to all that is before it on its row, other documents included. What is
            left over is a shorter row, without filler behind it. Else each document has rows of its own: one that is
            too long is cut into consecutive rows, which do not see each other, and the end of the last is filled.
        num_proc: processes that tokenize; one by default, and always for a stream.

    Returns:
        rows of what [`HierarchicalDataCollator`] reads, the same for a stream as for a dataset; and for a dataset a
        report: `num_documents`, `num_bytes` (of their UTF-8), `num_tokens` (that a likelihood counts), `num_rows`,
        `num_short_rows` (with fewer tokens than a whole one), `num_long_documents` (with more: they are cut).

    Raises:
        ValueError: for a model with a plan, a tokenizer whose BOS token the question has no room for, an empty
            dataset, and a text that is none.
    """
    if config.plan_len:
        raise ValueError(f"`plan_len` must be 0 for a model of plain text, but got {config.plan_len}")
    question = empty_question(tokenizer)
    check_lengths({"question_ids": question, "plan_ids": [], "execution_ids": []}, config)
    tokenize = partial(_tokenize, tokenizer=tokenizer, config=config)
    put_on_rows = partial(_wrap if wrap else _split, config=config, question=question)
    documents = documents.select_columns(TEXT)
    if isinstance(documents, IterableDataset):
        return _map(
            _map(documents, tokenize, TOKEN_FEATURES, [TEXT]), put_on_rows, ROW_FEATURES, [*TOKEN_FEATURES]
        ), {}
    if len(documents) == 0:
        raise ValueError("`documents` must have at least one document, but has none")
    uncached = {"load_from_cache_file": False}  # its key does not see the code that encodes
    tokens = _map(documents, tokenize, TOKEN_FEATURES, [TEXT], num_proc=num_proc, desc="Tokenizing", **uncached)
    rows = _map(tokens, put_on_rows, ROW_FEATURES, [*TOKEN_FEATURES], desc="Putting on rows", **uncached)
    report = _count(tokens, rows, config)
    logger.info(f"Plain text: {report}")
    return rows, report


def row_size(config: HierBD3LMConfig) -> int:
    """Tokens of text on a whole row."""
    return config.execution_len - 1  # the opener's place is the first


def _map(dataset: Documents, function: partial, features: Features, removed: list[str], **kwargs: Any) -> Documents:
    return dataset.map(
        function, batched=True, batch_size=WRAPPED_TOGETHER, remove_columns=removed, features=features, **kwargs
    )


def _tokenize(batch: Batch, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig) -> Batch:
    """The tokens of each document, without an `<|end|>`."""
    for text in batch[TEXT]:
        if not isinstance(text, str):
            raise ValueError(f"`{TEXT}` must be a text, but got {text!r}")
    token_ids = tokenizer(
        batch[TEXT], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    for ids in token_ids:
        check_content({"question_ids": [], "plan_ids": [], "execution_ids": ids}, config)
    return {"token_ids": token_ids, "num_bytes": [len(text.encode()) for text in batch[TEXT]]}


def _wrap(batch: Batch, config: HierBD3LMConfig, question: list[int]) -> Batch:
    """All documents side by side, cut into rows."""
    tokens = list(chain.from_iterable([*ids, config.end_token_id] for ids in batch["token_ids"]))
    return _as_rows([(piece, True) for piece in _cut(tokens, row_size(config))], config, question)


def _split(batch: Batch, config: HierBD3LMConfig, question: list[int]) -> Batch:
    """The rows of one document after those of the other."""
    rows = []
    for ids in batch["token_ids"]:
        *pieces, last = _cut([*ids, config.end_token_id], row_size(config))
        rows += [*((piece, True) for piece in pieces), (last[:-1], False)]  # which the collator closes
    return _as_rows(rows, config, question)


def _cut(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def _as_rows(rows: list[tuple[Sequence[int], bool]], config: HierBD3LMConfig, question: list[int]) -> Batch:
    examples = [
        {"question_ids": question, "plan_ids": [], "execution_ids": ids, "continues": continues}
        for ids, continues in rows
    ]
    examples = [example | {"length": example_length(example, config)} for example in examples]
    return {name: [example[name] for example in examples] for name in ROW_FEATURES}


def _count(tokens: Dataset, rows: Dataset, config: HierBD3LMConfig) -> dict[str, int]:
    whole = row_size(config)
    in_documents = [len(ids) + 1 for ids in tokens["token_ids"]]
    on_rows = [
        len(ids) + (not continues) for ids, continues in zip(rows["execution_ids"], rows["continues"], strict=True)
    ]
    return {
        "num_documents": len(tokens),
        "num_bytes": sum(tokens["num_bytes"]),
        "num_tokens": sum(in_documents),
        "num_rows": len(rows),
        "num_short_rows": sum(size < whole for size in on_rows),
        "num_long_documents": sum(size > whole for size in in_documents),
    }
