"""Quality of unconditional samples.

Generative perplexity is the perplexity of the samples under an autoregressive model, the scorer. Repetitive texts
lower it, so entropy and distinct n-grams are reported as well. All three use the scorer's tokenizer.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..data import run_folder
from ..data.arguments import check_at_least
from ..data.collator import collate_questions, empty_question
from ..data.decoding import decode
from ..data.files import read_text_rows
from ..data.questions import encode_text
from ..generation_hierbd3lm import HierBD3LMGenerationOutput, order_of, segment_limits
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings
from .arguments import SampleArguments
from .checkpoints import checksum_of_weights, load_model
from .runner import check_samples

SAMPLES_FILE, SETTINGS_FILE, METRICS_SUFFIX = "samples.jsonl", "settings.json", ".metrics.json"
NGRAM_SIZES = (1, 2, 3)


def measure(args: SampleArguments, path: Path) -> dict[str, Any]:
    """Compute the metrics of a file of samples (see [`judge`]), and write them to [`metrics_path`]."""
    texts = read_texts(path, args.text_field)
    scorer = AutoModelForCausalLM.from_pretrained(args.scorer).to(args.device).eval()
    context = args.context or getattr(scorer.config, "max_position_embeddings", None)
    tokenizer = AutoTokenizer.from_pretrained(args.scorer)
    metrics = judge(scorer, tokenizer, texts, context, args.batch_size)
    metrics |= {"samples": str(path), "text_field": args.text_field, "scorer": args.scorer, "context": context}
    run_folder.write_json(metrics_path(path), metrics)
    return metrics


def metrics_path(samples: Path) -> Path:
    """Return the path of the metrics, in the folder of the samples."""
    return samples.with_suffix(METRICS_SUFFIX)


def judge(
    scorer: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compute the metrics of texts.

    Args:
        scorer: causal language model of transformers, in evaluation mode.
        tokenizer: tokenizer of the scorer.
        context, batch_size: see [`nll_of_sequences`].

    Returns:
        - `generative_perplexity` and `nll` (nats per token), averages over the `num_scored_tokens` tokens of all
          texts. The first token of a text is only scored if the tokenizer adds a BOS token before it. `num_unscored`
          texts have no token to score.
        - `entropy`: mean of [`unigram_entropy`] over the texts that have tokens, with its standard error;
          `num_empty` texts have none.
        - `distinct_1`, `distinct_2`, `distinct_3`: see [`distinct_ngrams`].
        - `num_samples`, `num_tokens` (without BOS), `num_longer_than_context`.

        A value is None if it averages over nothing.
    """
    sequences = [encode_text(text, tokenizer, add_special_tokens=True) for text in texts]
    contents = [encode_text(text, tokenizer, add_special_tokens=False) for text in texts]
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
    """Compute -log p of each sequence given its first token, in nats; 0 for less than two tokens.

    Args:
        context: maximum context length of the scorer, >= 2; None for no limit. A longer sequence is scored in windows
            of this length. Neighbouring windows share one token, which is given in the second, so that every token is
            scored once.
        batch_size: windows per batch; >= 1.

    Raises:
        ValueError: if `context` or `batch_size` is out of range.
    """
    check_at_least("context", context, 2)
    check_at_least("batch_size", batch_size, 1)
    windows = [(index, window) for index, ids in enumerate(sequences) for window in _windows(ids, context)]
    # longest first: less padding, and running out of memory shows in the first batch
    windows.sort(key=lambda item: len(item[1]), reverse=True)
    totals = [0.0] * len(sequences)
    for start in tqdm(range(0, len(windows), batch_size), desc="Scoring", unit="batch"):
        indices, batch = zip(*windows[start : start + batch_size], strict=True)
        for index, nll in zip(indices, _nll_of_batch(scorer, batch), strict=True):
            totals[index] += nll
    return totals


def unigram_entropy(ids: Sequence[int]) -> float:
    """Compute the entropy of the token frequencies of a text in nats, as in the evaluations of MDLM and BD3-LM.

    Its maximum for n tokens is log n: only compare texts of about the same length.
    """
    return sum(count / len(ids) * math.log(len(ids) / count) for count in Counter(ids).values())


def distinct_ngrams(sequences: Iterable[Sequence[int]], size: int) -> float | None:
    """Compute the fraction of distinct n-grams over all texts (Li et al. 2016, section 5.2).

    N-grams do not cross texts. None if there is no n-gram.
    """
    ngrams = [tuple(ids[start : start + size]) for ids in sequences for start in range(len(ids) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def read_texts(path: str | os.PathLike, text_field: str = "text") -> list[str]:
    """Read the texts of a JSON lines file.

    Raises:
        ValueError: if a line is not a JSON object with a string `text_field` (the message names the line), or the file
            is empty.
    """
    texts = [row[text_field] for row in read_text_rows(path, (text_field,))]
    if not texts:
        raise ValueError(f"`samples` must hold at least one text, but {path} is empty")
    return texts


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


def _windows(ids: Sequence[int], context: int | None) -> Iterable[Sequence[int]]:
    """Split into windows of at most `context` tokens; neighbours share one token, and each has a token to score."""
    stride = max(len(ids), 1) if context is None else context - 1
    return (ids[start : start + stride + 1] for start in range(0, len(ids) - 1, stride))


def _nll_of_batch(scorer: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[float]:
    rows = [torch.tensor(ids, dtype=torch.long, device=scorer.device) for ids in batch]
    input_ids = pad_sequence(rows, batch_first=True)  # with token 0; padding is masked
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = scorer(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    nll = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    return (nll * attention_mask[:, 1:]).cpu().double().sum(dim=1).tolist()


def _mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# Generation of samples


def draw(args: SampleArguments) -> Path:
    """Generate samples with a checkpoint, or resume the generation; returns their file (see [`draw_samples`]).

    Raises:
        ValueError: if the folder holds samples of another run, and as in [`draw_samples`].
    """
    model, tokenizer = load_model(args.model, args.device)
    settings = resolve_settings(model.generation_config, (args.settings or {}) | {"seed": args.seed})
    segment_limits(model.config, order_of(model, settings), settings)
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
    """Generate texts from an empty question, except those that the file already holds.

    Args:
        settings: generation settings. The seed of each batch is derived from the given one.
        path: JSON lines file, extended batch by batch.

    Returns:
        the lines of the file, with `index`, `plan`, `execution`, `text` (plan and execution, on separate lines),
        `finished`, `num_forward_passes` and `tokens_per_forward` (see `HierBD3LMGenerationOutput`).

    Raises:
        ValueError: if several samples are requested at temperature 0.
    """
    check_samples(num_samples, settings)
    seeds = random.Random(settings.seed)
    starts = range(0, num_samples, batch_size)
    with run_folder.Log(path) as log, tqdm(total=num_samples, desc="Generating", unit="sample") as progress:
        for start, stop in pairwise((*starts, num_samples)):
            batch_settings = resolve_settings(settings, {"seed": seeds.getrandbits(62)})
            # An incomplete batch is generated again as a whole, since its rows share their random numbers.
            if len(log.records) < stop:
                samples = _draw_batch(model, tokenizer, stop - start, batch_settings)
                numbered = [{"index": start + row, **sample} for row, sample in enumerate(samples)]
                log.append(*numbered[len(log.records) - start :])
            progress.update(stop - start)
        return log.records


def _draw_batch(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    settings: HierBD3LMGenerationConfig,
) -> list[dict[str, Any]]:
    output = generate_unconditional(model, tokenizer, num_samples, settings)
    pad, names = model.config.pad_token_id, ("finished", "num_forward_passes", "tokens_per_forward")
    plans, executions, *others = (getattr(output, name).tolist() for name in ("plan", "execution", *names))
    samples = []
    for plan, execution, *values in zip(plans, executions, *others, strict=True):
        plan, execution = ([token for token in ids if token != pad] for ids in (plan, execution))
        texts = {"plan": decode(plan, tokenizer), "execution": decode(execution, tokenizer)}
        texts["text"] = "\n".join(filter(None, texts.values()))
        samples.append(texts | dict(zip(names, values, strict=True)))
    return samples


@torch.no_grad()
def generate_unconditional(
    model: HierBD3LMForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    settings: HierBD3LMGenerationConfig,
) -> HierBD3LMGenerationOutput:
    """Generate `num_samples` texts from an empty question; see [`draw_samples`]."""
    prompt = collate_questions([empty_question(tokenizer)] * num_samples, model.config.pad_token_id)
    prompt = {name: ids.to(model.device) for name, ids in prompt.items()}
    return model.generate(**prompt, generation_config=settings)
