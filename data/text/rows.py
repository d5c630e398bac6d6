"""Rows of tokens from plain text: documents concatenated and cut, or each with its own rows.

A row is all execution: the question is empty, and the model has no plan (`plan_len=0`). `<|execution|>` opens a row
and is given, like the BOS token of other models, so that a full row has `execution_len - 1` tokens of text. `<|end|>`
closes every document and is a token like any other. The likelihood counts the tokens of the documents and one
`<|end|>` for each, for every algorithm and either kind of rows.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...configuration_hierbd3lm import HierBD3LMConfig
from ..arguments import TEXT
from ..collator import ID_KEYS, check_content, check_lengths, empty_question, example_length
from ..tokenization import count_unknown

logger = logging.get_logger(__name__)

Documents = Dataset | IterableDataset
Batch = dict[str, list[Any]]

DOCUMENTS_PER_BATCH = 1000  # documents that are concatenated, as many as `map` passes at once
TOKEN_FEATURES = Features(
    {"token_ids": List(Value("int64")), "num_bytes": Value("int64"), "num_unknown": Value("int64")}
)
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
    """Convert documents to rows for training and evaluation, without losing or duplicating a token.

    Args:
        documents: has the column `text`, with one document per text; a document may be empty. The spelling of a
            special token in a text is encoded as text.
        wrap: concatenate `DOCUMENTS_PER_BATCH` documents at a time and cut them into full rows, as MDLM and BD3-LM
            do: a token attends to everything before it in its row, including other documents. The rest is a shorter
            row without filler. Otherwise each document has its own rows: a document that is too long is cut into
            consecutive rows, which do not attend to each other, and the last row is filled.
        num_proc: number of processes for tokenization; one by default, and always for a stream.

    Returns:
        rows for [`HierarchicalDataCollator`], the same for a stream as for a dataset; and a report, empty for a
        stream: `num_documents`, `num_bytes` (in UTF-8), `num_tokens` (counted by the likelihood),
        `num_unknown_tokens` (for text that is not in the vocabulary), `num_rows`, `num_short_rows` (with fewer tokens
        than a full row), `num_long_documents` (with more than a full row).

    Raises:
        ValueError: for a model with a plan, a tokenizer whose BOS token does not fit into the question, an empty
            dataset, and a text that is not a string.
    """
    if config.plan_len:
        raise ValueError(f"`plan_len` must be 0 for a model of plain text, but got {config.plan_len}")
    question = empty_question(tokenizer)
    check_lengths({"question_ids": question, "plan_ids": [], "execution_ids": []}, config)
    tokenize = partial(_tokenize, tokenizer=tokenizer, config=config)
    make_rows = partial(_wrap if wrap else _split, config=config, question=question)
    documents = documents.select_columns(TEXT)
    if isinstance(documents, IterableDataset):
        tokens = _map(documents, tokenize, TOKEN_FEATURES, [TEXT])
        return _map(tokens, make_rows, ROW_FEATURES, [*TOKEN_FEATURES]), {}
    if len(documents) == 0:
        raise ValueError("`documents` must have at least one document, but has none")
    uncached = {"load_from_cache_file": False}  # the cache's key does not include the encoding code
    tokens = _map(documents, tokenize, TOKEN_FEATURES, [TEXT], num_proc=num_proc, desc="Tokenizing", **uncached)
    rows = _map(tokens, make_rows, ROW_FEATURES, [*TOKEN_FEATURES], desc="Making rows", **uncached)
    report = _count(tokens, rows, config)
    log = logger.warning if report["num_unknown_tokens"] else logger.info
    log(f"Plain text: {report}")
    return rows, report


def row_size(config: HierBD3LMConfig) -> int:
    """Return the number of text tokens in a full row."""
    return config.execution_len - 1  # the opener is the first token


def _map(dataset: Documents, function: partial, features: Features, removed: list[str], **kwargs: Any) -> Documents:
    return dataset.map(
        function, batched=True, batch_size=DOCUMENTS_PER_BATCH, remove_columns=removed, features=features, **kwargs
    )


def _tokenize(batch: Batch, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig) -> Batch:
    """Tokenize each document, without `<|end|>`."""
    for text in batch[TEXT]:
        if not isinstance(text, str):
            raise ValueError(f"`{TEXT}` must be a string, but got {text!r}")
    token_ids = tokenizer(
        batch[TEXT], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]
    for ids in token_ids:
        check_content({"question_ids": [], "plan_ids": [], "execution_ids": ids}, config)
    return {
        "token_ids": token_ids,
        "num_bytes": [len(text.encode()) for text in batch[TEXT]],
        "num_unknown": [count_unknown(ids, tokenizer) for ids in token_ids],
    }


def _wrap(batch: Batch, config: HierBD3LMConfig, question: list[int]) -> Batch:
    """Concatenate the documents and cut them into rows."""
    tokens = list(chain.from_iterable([*ids, config.end_token_id] for ids in batch["token_ids"]))
    return _as_rows([(piece, True) for piece in _cut(tokens, row_size(config))], config, question)


def _split(batch: Batch, config: HierBD3LMConfig, question: list[int]) -> Batch:
    """Cut each document into its own rows."""
    rows = []
    for ids in batch["token_ids"]:
        *pieces, last = _cut([*ids, config.end_token_id], row_size(config))
        rows += [*((piece, True) for piece in pieces), (last[:-1], False)]  # the collator adds `<|end|>`
    return _as_rows(rows, config, question)


def _cut(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def _as_rows(rows: list[tuple[Sequence[int], bool]], config: HierBD3LMConfig, question: list[int]) -> Batch:
    empty = {"question_ids": question, "plan_ids": []}
    examples = [empty | {"execution_ids": ids, "continues": continues} for ids, continues in rows]
    examples = [example | {"length": example_length(example, config)} for example in examples]
    return {name: [example[name] for example in examples] for name in ROW_FEATURES}


def _count(tokens: Dataset, rows: Dataset, config: HierBD3LMConfig) -> dict[str, int]:
    size = row_size(config)
    document_lengths = [len(ids) + 1 for ids in tokens["token_ids"]]
    row_lengths = [len(row["execution_ids"]) + (not row["continues"]) for row in rows]
    return {
        "num_documents": len(tokens),
        "num_bytes": sum(tokens["num_bytes"]),
        "num_tokens": sum(document_lengths),
        "num_unknown_tokens": sum(tokens["num_unknown"]),
        "num_rows": len(rows),
        "num_short_rows": sum(length < size for length in row_lengths),
        "num_long_documents": sum(length > size for length in document_lengths),
    }
