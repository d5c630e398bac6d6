"""Training on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hierbd3lm.training.checkpoints import EMA_FILE

from .tiny import make_dataset
from .tiny_trainer import SGD, counted_tokens, losses_of, make_trainer, seeded_model

DISTRIBUTED_SCRIPT = """
import json, sys
from pathlib import Path
from datasets import load_from_disk
from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training.arguments import HierBD3LMTrainingArguments

folder = Path(sys.argv[1])
model = HierBD3LMForBlockDiffusion.from_pretrained(folder / "model")
arguments = HierBD3LMTrainingArguments(output_dir=str(folder / "run"), **json.loads(sys.argv[2]))
trainer = HierBD3LMTrainer(
    model,
    arguments,
    train_dataset=load_from_disk(folder / "train"),
    eval_dataset=load_from_disk(folder / "eval"),
    data_collator=HierarchicalDataCollator(model.config),
)
assert trainer.accelerator.num_processes == 2 and model.device.type == "cpu"
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    (folder / "metrics.json").write_text(json.dumps({"eval": metrics, "logs": trainer.state.log_history}))
trainer.accelerator.end_training()
"""


def launch_two_processes(folder, settings):
    """Launch two processes on the CPU with gloo. `accelerate launch --cpu` would start a single process."""
    script = folder / "script.py"
    script.write_text(DISTRIBUTED_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(script), str(folder), json.dumps(settings)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_equal_one_with_twice_the_batch_size(tmp_path, packing):
    model = seeded_model(block_size=1)
    # the same length for all, so that one and two processes see the examples in the same order
    train = make_dataset(12, model.config).map(lambda row: {"length": 1})
    held_out = make_dataset(7, model.config, seed=1)  # the last batch is not full
    model.save_pretrained(tmp_path / "model")
    train.save_to_disk(tmp_path / "train")
    held_out.save_to_disk(tmp_path / "eval")
    settings = SGD | {"use_cpu": True, "max_steps": 3, "logging_steps": 1, "disable_tqdm": True, "ema_decay": 0.3}
    settings |= {"per_device_eval_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"packing": packing}
    launch_two_processes(tmp_path, settings | {"per_device_train_batch_size": 2})
    datasets = {"train_dataset": train, "eval_dataset": held_out}
    alone = make_trainer(tmp_path / "alone", model, per_device_train_batch_size=4, **datasets, **settings)
    alone.train()
    for file in ("model.safetensors", EMA_FILE):
        together = load_file(tmp_path / "run" / "checkpoint-3" / file)
        expected = load_file(tmp_path / "alone" / "checkpoint-3" / file)
        for name, tensor in together.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    results, metrics = json.loads(Path(tmp_path, "metrics.json").read_text()), alone.evaluate()
    assert results["eval"]["eval_num_tokens"] == sum(counted_tokens(held_out).values())
    for name in ("eval_nll", "eval_plan_nll", "eval_execution_nll"):
        assert results["eval"][name] == pytest.approx(metrics[name], rel=1e-4)
    for name in ("loss", "loss_plan", "loss_execution"):
        together = [entry[name] for entry in results["logs"] if name in entry]
        assert together == pytest.approx(losses_of(alone, name), rel=1e-4)
