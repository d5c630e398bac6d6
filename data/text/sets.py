"""The sets of plain text that a zero-shot perplexity is published of, by name: `DataArguments` of each.

The sets and splits are those of MDLM's table 3 (Sahoo et al. 2024; `dataloader.py` of its repository chooses
validation where it does not say test), which BD3-LM's zero-shot table repeats. All are wrapped. WikiText-103 has the
validation split of WikiText-2.

One thing differs from the published numbers: a row has one given token in front and none behind it, where MDLM closes
every row by an EOS token that it counts.

The Hub was not reached when this table was written. The names are of repositories that hold data files and no script,
which `datasets` no longer runs, or of the Hub's own conversion to parquet: PTB. Those of PubMed and arXiv are the
articles of `scientific_papers` in a repository with files.
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
