"""What a conversion keeps of an open checkpoint, and what a short training makes of it.

`python -m hierbd3lm.benchmarks.conversion CHECKPOINT` (a folder or an id of the Hub; GSM8K through `GSM8K_DIR` or the
Hub). The checkpoint is converted twice: with shifted prediction and a causal question, which is the default, and with
prediction in place and a bidirectional question. Both are trained on the same short GSM8K problems with the same
seeds, 24 steps of 4 problems with blocks of one token and 24 steps with blocks of four. The NELBO of the same 24
problems held out from the training split is measured before, between and after, at both block sizes. An interrupted
run continues where it was saved.
"""

import json
import shutil
from pathlib import Path

import torch
from datasets import Dataset

from hierbd3lm import train
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.loading import prepare_dataset
from hierbd3lm.data.splits import load_split
from hierbd3lm.evaluation.checkpoints import load_model
from hierbd3lm.evaluation.likelihood import measure_likelihood
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.block_growth import resize_blocks
from hierbd3lm.training.lora import load_tokenizer

from .measure import as_flags, bar, is_trained, make_parser, write_results

KINDS = {
    "shifted": {"prediction": "shifted", "question_attention": "causal"},
    "in place": {"prediction": "in_place", "question_attention": "bidirectional"},
}
BLOCK_SIZES = (1, 4)
GROWTH_STEP, NUM_STEPS = 24, 48  # from blocks of one token to blocks of four, and the end
NUM_HELD_OUT, NUM_MEASURED, NUM_DRAWS = 64, 24, 2
# Short problems: longer ones are dropped, and counted in the log.
LENGTHS = {"question_len": 96, "plan_len": 64, "execution_len": 96}
SETTINGS = {
    "dataset": "openai/gsm8k",
    "num_validation_examples": NUM_HELD_OUT,
    "block_size": BLOCK_SIZES[-1],
    "block_size_schedule": json.dumps({0: 1, GROWTH_STEP: 4}),
    "per_device_train_batch_size": 4,
    "bf16": True,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "ema_decay": 0,
    "max_steps": NUM_STEPS,
    "save_steps": GROWTH_STEP // 2,
    "logging_steps": 10,
    "eval_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
    "resume_from_checkpoint": "last",
}


def train_converted(checkpoint: str, kind: str, folder: Path) -> None:
    """Convert and train the checkpoint with the package's own command."""
    if not is_trained(folder):
        settings = {"init_from": checkpoint, "output_dir": folder} | SETTINGS | LENGTHS | KINDS[kind]
        train.main(as_flags(settings))


@torch.no_grad()
def nelbo_by_block_size(model: HierBD3LMForBlockDiffusion, problems: Dataset) -> dict[int, float]:
    """Measure the bound in nats per token at each of `BLOCK_SIZES`."""
    nelbos = {}
    for size in BLOCK_SIZES:
        resize_blocks(model, size)
        nelbos[size] = measure_likelihood(model.eval(), problems, NUM_DRAWS, batch_size=8)["nll"]
    return nelbos


def measure(checkpoint: str, output: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Return kind -> moment -> block size -> nats per token."""
    args = DataArguments(dataset=SETTINGS["dataset"], num_validation_examples=NUM_HELD_OUT)
    rows, measured = load_split(args, "validation"), {}
    for kind, fields in KINDS.items():
        folder = output / kind.replace(" ", "_")
        tokenizer = load_tokenizer(checkpoint)
        torch.manual_seed(0)
        model = HierBD3LMForBlockDiffusion.from_autoregressive(checkpoint, tokenizer, **fields, **LENGTHS)
        problems, _ = prepare_dataset(rows, tokenizer, model.config)
        problems = problems.select(range(min(NUM_MEASURED, len(problems))))
        measured[kind] = {"before training": nelbo_by_block_size(model, problems)}
        train_converted(checkpoint, kind, folder)
        for step, name in ((GROWTH_STEP, f"after {GROWTH_STEP} steps"), (NUM_STEPS, f"after {NUM_STEPS} steps")):
            trained, _ = load_model(str(folder / f"checkpoint-{step}"), "cpu")
            measured[kind][name] = nelbo_by_block_size(trained, problems)
    return measured


def main() -> None:
    parser = make_parser("conversion", __doc__)
    parser.add_argument("checkpoint", help="Folder or Hub id of an autoregressive checkpoint.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/conversion"), help="Folder of the runs.")
    parser.add_argument("--overwrite", action="store_true", help="Start the runs anew.")
    args = parser.parse_args()
    if args.overwrite:
        shutil.rmtree(args.output_dir, ignore_errors=True)
    measured = measure(args.checkpoint, args.output_dir)
    bars = [
        bar(f"{moment}, block size {size}: shifted / in place, nats per token", nelbo / other, 1, True)
        for moment, nelbos in measured["shifted"].items()
        for size, nelbo, other in zip(nelbos, nelbos.values(), measured["in place"][moment].values(), strict=True)
    ]
    write_results("conversion", "gsm8k", bars, measured)


if __name__ == "__main__":
    main()
