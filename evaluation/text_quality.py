"""Quality of unconditional samples: `python -m hierbd3lm.evaluation.text_quality --help`.

Generative perplexity is the perplexity of the samples under another, autoregressive model, the scorer. Repetition
lowers it, so entropy and distinct n-grams are reported too. All metrics use the scorer's tokenizer, whichever
tokenizer the sampled model has.
"""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from ..data import run_folder
from ..data.arguments import check_at_least
from ..data.collator import empty_question
from ..generation_hierbd3lm import segment_limits
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from .checkpoints import default_device
from .runner import (
    Prompt,
    Written,
    check_samples,
    checksum_of_weights,
    decode,
    generate_batch,
    load_model,
    read_texts,
)

SAMPLES_FILE, SETTINGS_FILE, METRICS_SUFFIX = "samples.jsonl", "settings.json", ".metrics.json"
NGRAM_SIZES = (1, 2, 3)


@dataclass
class SampleArguments:
    """Arguments for the samples, or the model to sample from, and the scorer."""

    scorer: str = field(metadata={"help": "Folder or Hub id of an autoregressive model, such as gpt2-large."})
    samples: str | None = field(default=None, metadata={"help": "A .jsonl file of samples, instead of `model`."})
    model: str | None = field(
        default=None, metadata={"help": "Folder of a hierbd3lm checkpoint to sample from, with an empty question."}
    )
    num_samples: int | None = field(default=None, metadata={"help": "Number of samples to draw from `model`."})
    settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Generation settings as JSON. Those that are omitted are taken from the checkpoint."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed of sampling; the seed of each batch derives from it."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the samples of `model`; defaults to `samples` in `model`."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Overwrite existing samples in `output_dir`."})
    text_field: str = field(default="text", metadata={"help": "Key of the text in a line of the samples."})
    context: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens that the scorer reads at once; default: its limit."}
    )
    batch_size: int = field(default=8, metadata={"help": "Batch size of sampling and of scoring."})
    device: str | None = field(default=None, metadata={"help": "Device, such as `cuda:0`; defaults to a GPU, if any."})

    def __post_init__(self):
        if (self.samples is None) == (self.model is None) or (self.model is None) != (self.num_samples is None):
            raise ValueError(
                f"`samples`, or `model` with `num_samples`, must be given, but got samples={self.samples!r}, "
                f"model={self.model!r}, num_samples={self.num_samples!r}"
            )
        for name, low in (("num_samples", 1), ("batch_size", 1), ("context", 2)):
            check_at_least(name, getattr(self, name), low)
        if isinstance(self.settings, str):
            self.settings = json.loads(self.settings)
        if self.model is not None and self.output_dir is None:
            self.output_dir = str(Path(self.model, "samples"))
        if self.device is None:
            self.device = default_device()


def parse_arguments(argv: list[str]) -> SampleArguments:
    """Parse `--scorer DIR` with `--samples FILE` or `--model DIR --num_samples N`, and `[--setting value ...]`."""
    return HfArgumentParser(SampleArguments).parse_args_into_dataclasses(argv)[0]


def main() -> None:
    """Run the command line."""
    args = parse_arguments(sys.argv[1:])
    path = Path(args.samples) if args.model is None else sample_checkpoint(args)
    metrics = evaluate_samples(args, path)
    print(f"{path} under {args.scorer} ({metrics_path(path)})")
    print(format_metrics(metrics))


def evaluate_samples(args: SampleArguments, path: Path) -> dict[str, Any]:
    """Compute the metrics of a file of samples (see [`text_metrics`]), and write them to [`metrics_path`]."""
    texts = [text for (text,) in read_texts(path, args.text_field)]
    if not texts:
        raise ValueError(f"`samples` must hold at least one text, but {path} is empty")
    scorer = AutoModelForCausalLM.from_pretrained(args.scorer).to(args.device).eval()
    context = args.context or getattr(scorer.config, "max_position_embeddings", None)
    tokenizer = AutoTokenizer.from_pretrained(args.scorer)
    metrics = text_metrics(scorer, tokenizer, texts, context, args.batch_size)
    metrics |= {"samples": str(path), "text_field": args.text_field, "scorer": args.scorer, "context": context}
    run_folder.write_json(metrics_path(path), metrics)
    return metrics


def metrics_path(samples: Path) -> Path:
    """Return the path of the metrics of a file of samples, in the same folder."""
    return samples.with_suffix(METRICS_SUFFIX)


# Metrics


def text_metrics(
    scorer: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compute all metrics of the texts.

    Args:
        scorer: a causal language model of transformers, in evaluation mode.
        tokenizer: tokenizer of the scorer.
        context, batch_size: see [`nll_of_sequences`].

    Returns:
        - `generative_perplexity` and `nll` (nats per token) over the `num_scored_tokens` of all texts. The first
          token of a text is not scored, unless the tokenizer adds a BOS token before it. `num_unscored` texts have no
          token to score.
        - `entropy`: mean of [`unigram_entropy`] over the non-empty texts, and `entropy_standard_error`; `num_empty`
          texts have no tokens.
        - `distinct_1`, `distinct_2`, `distinct_3`: see [`distinct_ngrams`].
        - `num_samples`, `num_tokens` (without BOS), `num_longer_than_context`.

        A mean over nothing is None.
    """
    sequences = [_encode(tokenizer, text, add_special_tokens=True) for text in texts]
    contents = [_encode(tokenizer, text, add_special_tokens=False) for text in texts]
    total_nll = sum(nll_of_sequences(scorer, sequences, context, batch_size))
    num_scored = sum(max(len(ids) - 1, 0) for ids in sequences)
    nll = total_nll / num_scored if num_scored else None
    entropies = [unigram_entropy(ids) for ids in contents if ids]
    mean, standard_error = _mean_and_error(entropies)
    return {
        "num_samples": len(texts),
        "generative_perplexity": None if nll is None else math.exp(nll),
        "nll": nll,
        "num_scored_tokens": num_scored,
        "num_unscored": sum(len(ids) < 2 for ids in sequences),
        "num_longer_than_context": 0 if context is None else sum(len(ids) > context for ids in sequences),
        "entropy": mean,
        "entropy_standard_error": standard_error,
        "num_empty": len(texts) - len(entropies),
        **{f"distinct_{size}": distinct_ngrams(contents, size) for size in NGRAM_SIZES},
        "num_tokens": sum(map(len, contents)),
    }


@torch.no_grad()
def nll_of_sequences(
    scorer: torch.nn.Module, sequences: Sequence[Sequence[int]], context: int | None = None, batch_size: int = 8
) -> list[float]:
    """Compute the NLL of each token sequence given its first token, in nats; 0 for fewer than two tokens.

    Args:
        context: maximum number of tokens that the scorer reads at once, at least 2; None for no limit. A longer
            sequence is split into windows of `context` tokens. Each window starts with the last token of the previous
            one, which is not scored again.
        batch_size: number of windows in a forward pass.

    Raises:
        ValueError: if `context` or `batch_size` is out of its range.
    """
    check_at_least("context", context, 2)
    check_at_least("batch_size", batch_size, 1)
    windows = [(index, window) for index, ids in enumerate(sequences) for window in _windows(ids, context)]
    windows.sort(key=lambda item: len(item[1]), reverse=True)  # little padding; an OOM occurs in the first batch
    totals = [0.0] * len(sequences)
    for start in tqdm(range(0, len(windows), batch_size), desc="Scoring", unit="batch"):
        indices, batch = zip(*windows[start : start + batch_size], strict=True)
        for index, nll in zip(indices, _nll_of_batch(scorer, batch), strict=True):
            totals[index] += nll
    return totals


def unigram_entropy(ids: Sequence[int]) -> float:
    """Compute the entropy in nats of the token frequencies within a text, as MDLM and BD3-LM report it.

    The maximum for n tokens is log n, so only compare texts of about the same length.
    """
    return sum(count / len(ids) * math.log(len(ids) / count) for count in Counter(ids).values())


def distinct_ngrams(sequences: Iterable[Sequence[int]], size: int) -> float | None:
    """Compute the fraction of distinct n-grams among the n-grams of all texts (Li et al. 2016, section 5.2).

    N-grams do not cross text boundaries. The result is None if there are no n-grams.
    """
    ngrams = [tuple(ids[start : start + size]) for ids in sequences for start in range(len(ids) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def format_metrics(metrics: dict[str, Any]) -> str:
    """Format the metrics as a table."""
    decimals = {"generative_perplexity": 2, "nll": 4, "entropy": 4, "entropy_standard_error": 4}
    decimals |= {f"distinct_{size}": 4 for size in NGRAM_SIZES}
    lines = []
    for name, value in metrics.items():
        if name in decimals:
            lines.append((name, "-" if value is None else f"{value:,.{decimals[name]}f}"))
        elif name.startswith("num_"):
            lines.append((name.removeprefix("num_"), f"{value:,}"))
    return "\n".join(f"{name.replace('_', ' '):<26}{value:>12}" for name, value in lines)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _windows(ids: Sequence[int], context: int | None) -> Iterable[Sequence[int]]:
    """Split a sequence into windows of at most `context` tokens that overlap by one; none without a token to score."""
    stride = max(len(ids), 1) if context is None else context - 1
    return (ids[start : start + stride + 1] for start in range(0, len(ids) - 1, stride))


def _nll_of_batch(scorer: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[float]:
    rows = [torch.tensor(ids, dtype=torch.long, device=scorer.device) for ids in batch]
    input_ids = pad_sequence(rows, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = scorer(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    nll = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    return (nll * attention_mask[:, 1:]).double().sum(dim=1).tolist()


def _mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# Sampling


def sample_checkpoint(args: SampleArguments) -> Path:
    """Sample texts from a checkpoint, or resume it, and return their file; see [`draw_samples`].

    Raises:
        ValueError: if the folder holds samples of another run, and as in [`draw_samples`].
    """
    model, tokenizer = load_model(args.model, args.device)
    settings = resolve_settings(model.generation_config, (args.settings or {}) | {"seed": args.seed})
    segment_limits(model.config, settings)
    check_samples(args.num_samples, settings)
    folder = Path(args.output_dir)
    run = {name: getattr(args, name) for name in ("num_samples", "batch_size", "device")}
    run |= {name: value for name, value in vars(settings).items() if name[0] != "_"}
    run["checksum_of_weights"] = checksum_of_weights(model)
    path = folder / SAMPLES_FILE
    results = SAMPLES_FILE, metrics_path(path).name
    run_folder.start_run(folder, run, SETTINGS_FILE, results, args.overwrite)
    draw_samples(model, tokenizer, args.num_samples, settings, path, args.batch_size)
    return path


def draw_samples(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    settings: HierBD3LMGenerationConfig,
    path: Path,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Sample texts from a model, with an empty question. Samples that the file already holds are kept.

    Args:
        settings: generation settings. The seed of each batch derives from their seed.
        path: a JSON lines file, which is extended batch by batch.

    Returns:
        its lines: `index`, `text` (plan and execution together), `plan`, `execution`, `finished`,
        `num_forward_passes`, `tokens_per_forward` (see `HierBD3LMGenerationOutput`).

    Raises:
        ValueError: for several samples at temperature 0.
    """
    check_samples(num_samples, settings)
    seeds = random.Random(settings.seed)
    starts = range(0, num_samples, batch_size)
    with run_folder.Log(path) as log, tqdm(total=num_samples, desc="Drawing", unit="sample") as progress:
        for start, stop in pairwise((*starts, num_samples)):
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            # An incomplete batch is drawn again as a whole, as its rows depend on the same random generator.
            if len(log.records) < stop:
                samples = generate_unconditional(model, tokenizer, stop - start, batch_settings)
                lines = [_sample_line(index, written, tokenizer) for index, written in enumerate(samples, start)]
                log.append(*lines[len(log.records) - start :])
            progress.update(stop - start)
        return log.records


def generate_unconditional(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    settings: HierBD3LMGenerationConfig,
) -> list[Written]:
    """Generate `num_samples` texts from an empty question."""
    question = empty_question(tokenizer)
    return generate_batch(model, [Prompt(index, question, None, []) for index in range(num_samples)], settings)


def _sample_line(index: int, written: Written, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    parts = {"text": written.plan_ids + written.execution_ids}
    parts |= {"plan": written.plan_ids, "execution": written.execution_ids}
    texts = {name: decode(ids, tokenizer) for name, ids in parts.items()}
    costs = ("finished", "num_forward_passes", "tokens_per_forward")
    return {"index": index, **texts, **{name: getattr(written, name) for name in costs}}


if __name__ == "__main__":
    main()
