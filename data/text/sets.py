"""Datasets of plain text with published zero-shot perplexities: `DataArguments` by name.

Data sets and splits are those of MDLM's table 3 (Sahoo et al. 2024; `dataloader.py` of its repository uses validation
where test is not named), which BD3-LM's zero-shot table reuses. All are wrapped. WikiText-103 has the validation split
of WikiText-2.

One difference from the published setup: a row starts with one given token and has no token after its text, while
MDLM closes every row with an EOS token that it counts.

The names were not checked against the Hub when this table was written. They are repositories with data files and
without a loading script, which `datasets` no longer runs; PTB is the Hub's own conversion to parquet. PubMed and arXiv
are the articles of `scientific_papers` in a repository with files.
"""

from typing import Any

TEXT_SETS: dict[str, dict[str, Any]] = {
    "ptb": {
        "dataset": "ptb-text-only/ptb_text_only",
        "dataset_revision": "refs/convert/parquet",
        "dataset_test_split": "validation",
        "text_column": "sentence",
        "detokenizer": "ptb",
    },
    "wikitext": {
        "dataset": "Salesforce/wikitext",
        "dataset_name": "wikitext-103-raw-v1",
        "dataset_test_split": "validation",
        "text_column": "text",
        "detokenizer": "wikitext",
    },
    "lm1b": {
        "dataset": "dvruette/lm1b",
        "dataset_test_split": "test",
        "text_column": "text",
        "detokenizer": "lm1b",
    },
    "lambada": {
        "dataset": "EleutherAI/lambada_openai",
        "dataset_name": "default",
        "dataset_test_split": "test",
        "text_column": "text",
        "detokenizer": "lambada",
    },
    "ag_news": {"dataset": "fancyzhx/ag_news", "dataset_test_split": "test", "text_column": "text"},
    "pubmed": {
        "dataset": "ccdv/pubmed-summarization",
        "dataset_name": "document",
        "dataset_test_split": "validation",
        "text_column": "article",
        "detokenizer": "papers",
    },
    "arxiv": {
        "dataset": "ccdv/arxiv-summarization",
        "dataset_name": "document",
        "dataset_test_split": "validation",
        "text_column": "article",
        "detokenizer": "papers",
    },
}
