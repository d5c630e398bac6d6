"""The recipes say what can be run: every file of configs/ is accepted by what reads it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModel, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from hierbd3lm import eval_gsm8k, train, trainer
from hierbd3lm.backbones_hierbd3lm import add_special_tokens, special_token_ids
from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.loading import load_reasoning_dataset, prepare_dataset
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.training.arguments import TrainScriptArguments
from hierbd3lm.training.lora import check_adapter
from hierbd3lm.training.settings import CONFIG_FIELDS, ModelArguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
LAUNCHES = sorted(path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPEN_CHECKPOINTS = {"Qwen/Qwen3-0.6B": Qwen3Config, "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config, SMOLLM2: LlamaConfig}
TINY_BACKBONE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_BACKBONE |= {"num_key_value_heads": 1, "head_dim": 8}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def recipe(name):
    return ROOT / "configs" / f"{name}.yaml"


def parse(name, folder, *settings):
    return train.parse_arguments([str(recipe(name)), "--output_dir", str(folder), "--use_cpu", "true", *settings])


def config_of(model_args):
    """The configuration that the recipe trains, and nothing is downloaded for."""
    if model_args.init_from is not None:
        backbone = OPEN_CHECKPOINTS[model_args.init_from](vocab_size=151936)
        return HierBD3LMConfig(backbone_config=backbone, **model_args.config_fields())
    ids = dict(zip(("pad", "mask", "plan", "execution", "end"), range(5), strict=True))
    backbone = model_args.backbone | {"vocab_size": model_args.vocab_size or 256}
    ids = {f"{role}_token_id": number for role, number in ids.items()}
    return HierBD3LMConfig(backbone_config=backbone, **ids, **model_args.config_fields())


# Training


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_model_data_and_a_training(name, tmp_path):
    model_args, data_args, args = parse(name, tmp_path)
    with torch.device("meta"):
        model = HierBD3LMForBlockDiffusion(config_of(model_args))
    assert model.num_parameters() > 1e5
    check_adapter(model_args)
    SyntheticConfig(**data_args.synthetic)
    assert args.learning_rate > 0 and args.warmup_steps > 0 and args.ema_decay > 0
    assert data_args.num_validation_examples > 0 and args.eval_strategy != "no"


def test_the_demo_goes_from_blocks_of_one_token_to_larger_ones_in_one_command():
    printed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = [shlex.split(line) for line in printed.replace("\\\n", " ").splitlines()]
    (training,) = [words[words.index("train.py") + 1 :] for words in commands if "train.py" in words]
    model_args, _, args = train.parse_arguments(training)
    assert list(args.block_size_schedule.values()) == [1, 4]
    assert model_args.init_from is None
    (answers,) = [words[words.index("eval_gsm8k.py") + 1 :] for words in commands if "eval_gsm8k.py" in words]
    assert eval_gsm8k.parse_arguments(answers).model == args.output_dir


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name):
    classes = (ModelArguments, DataArguments, TrainScriptArguments)
    defaults = {item.name: item.default for cls in classes for item in fields(cls)}
    config = HierBD3LMConfig()
    defaults |= {field: getattr(config, field) for field in CONFIG_FIELDS if hasattr(config, field)}
    defaults["block_size"] = config.plan_block_size
    settings = yaml.safe_load(recipe(name).read_text())
    assert settings.keys() <= defaults.keys()
    assert {key: value for key, value in settings.items() if value == defaults[key]} == {}


def test_the_recipes_cover_lengths_starts_and_adapters(tmp_path):
    seen = set()
    for name in RECIPES:
        model_args, data_args, args = parse(name, tmp_path)
        config = config_of(model_args)
        lengths = (config.question_len, config.plan_len, config.execution_len) if data_args.fixed_length else None
        seen.add((data_args.dataset, model_args.init_from, model_args.use_peft, lengths))
        if model_args.init_from is not None:
            assert args.bf16 and model_args.dtype == "float32"
            assert args.activation_checkpointing or model_args.init_from == SMOLLM2  # which is small
    gsm8k = "openai/gsm8k"
    assert seen >= {
        (gsm8k, None, False, None),
        (gsm8k, None, False, (256, 256, 512)),
        (gsm8k, None, False, (128, 128, 256)),
        *((gsm8k, start, peft, None) for start in OPEN_CHECKPOINTS for peft in (False, True) if start != SMOLLM2),
        (gsm8k, SMOLLM2, False, None),
    }


@pytest.mark.slow
@pytest.mark.skipif(
    "SMOLLM2_DIR" not in os.environ or "GSM8K_DIR" not in os.environ,
    reason="SMOLLM2_DIR and GSM8K_DIR must name folders with a real tokenizer and real problems",
)
def test_the_recipe_for_own_data_drops_no_real_problem(tmp_path):
    model_args, _, _ = parse("own_data", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(os.environ["SMOLLM2_DIR"])
    add_special_tokens(tokenizer)
    fields = model_args.config_fields() | special_token_ids(tokenizer) | {"chat_template": True}
    config = HierBD3LMConfig(backbone_config={"vocab_size": len(tokenizer)}, **fields)
    _, report = prepare_dataset(load_reasoning_dataset("openai/gsm8k", "test"), tokenizer, config)
    assert report["num_dropped"] == 0 and report["num_kept"] > 1000


def test_the_recipe_of_the_gpu_benchmark_has_at_most_100_million_weights(tmp_path):
    model_args, data_args, _ = parse("gsm8k_gpu", tmp_path)
    with torch.device("meta"):
        model = HierBD3LMForBlockDiffusion(config_of(model_args))
    assert 8e7 < model.num_parameters() <= 1e8
    assert data_args.num_synthetic_examples > 0


def test_fixed_lengths_reach_the_batches(tmp_path, monkeypatch):
    seen = []

    class Trainer:
        def __init__(self, *args, data_collator, train_dataset, **kwargs):
            seen.append(data_collator(train_dataset.to_list()[:2])["input_ids"].shape)
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "HierBD3LMTrainer", Trainer)
    for fixed in (True, False):
        run_train(monkeypatch, tmp_path / str(fixed), fixed_length=fixed)
    assert seen[0] == (2, 32 + 16 + 24) and seen[1][1] < 72


def run_train(monkeypatch, folder, **settings):
    """Trains in this process, until the trainer raises a KeyboardInterrupt."""
    monkeypatch.setattr(sys, "argv", ["train.py", write_settings(folder, **settings)])
    with pytest.raises(KeyboardInterrupt):
        train.main()


def write_settings(folder, **settings):
    """A tiny training on examples of one length; with one token per block it depends on no draw."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(10, 22)
    rows = [{"question": f"add 1 to {n}", "plan": f"{n} + 1", "execution": f"{n + 1}\n#### {n + 1}"} for n in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = {"question_len": 32, "plan_len": 16, "execution_len": 24, "block_size": 1}
    defaults = {"dataset": str(folder / "rows.jsonl"), "num_validation_examples": 0, "backbone": TINY_BACKBONE}
    defaults |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    defaults |= {"learning_rate": 0.01, "ema_decay": 0.5}
    defaults |= {"output_dir": str(folder / "out"), "use_cpu": True, "disable_tqdm": True}
    (folder / "settings.yaml").write_text(yaml.safe_dump(defaults | lengths | settings))
    return str(folder / "settings.yaml")


# Launching


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_accepts_the_launch(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()
    expected = {
        "one_gpu": ("NO", 1, 1),
        "multi_gpu": ("MULTI_GPU", 8, 1),
        "multi_node": ("MULTI_GPU", 16, 2),
        "fsdp2": ("FSDP", 8, 1),
        "deepspeed_zero3": ("DEEPSPEED", 8, 1),
    }
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == expected[name]
    assert config.mixed_precision is None  # as the recipe says
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == (3 if name == "deepspeed_zero3" else None)
    assert len(LAUNCHES) == len(expected)


def test_the_slurm_script_starts_one_launcher_per_node(tmp_path):
    fake(tmp_path / "scontrol", 'printf "node7\\nnode8\\n"')
    fake(tmp_path / "srun", 'while [ "${1:0:1}" = - ]; do shift; done; for r in 0 1; do SLURM_NODEID=$r "$@"; done')
    fake(tmp_path / "accelerate", f'printf "%s\\n" "$*" >>{tmp_path}/calls')
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = os.environ | job | {"SLURM_JOB_ID": "123456", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "configs/slurm.sh", "configs/gsm8k_qwen3.yaml", "--learning_rate", "1e-5"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    for rank, call in enumerate(calls):
        launch, *words = call.split()
        args = launch_command_parser().parse_args(words)
        assert (launch, args.machine_rank, args.num_machines, args.num_processes) == ("launch", rank, 2, 8)
        assert (args.main_process_ip, args.main_process_port) == ("node7", 23456)
        assert Path(ROOT, args.config_file).is_file() and Path(ROOT, args.training_script).is_file()
        resume = ["--resume_from_checkpoint", "last"]
        assert args.training_script_args == [*command[2:], *resume]
    refused = subprocess.run(command, env=os.environ | {"SLURM_JOB_NODELIST": ""}, cwd=ROOT, capture_output=True)
    assert refused.returncode and b"start this script with sbatch" in refused.stderr


def fake(path, script):
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


# Sharded weights

SHARDED_SCRIPT = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from hierbd3lm import train, trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Trainer(trainer.HierBD3LMTrainer):
    def __init__(self, *args, **kwargs):
        # accelerate shards on GPUs alone: it is told that there are some, and continues with the CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        assert self.accelerator.is_fsdp2 and self.accelerator.num_processes == 2 and self.args.device.type == "cpu"

    def save_model(self, *args, **kwargs):
        assert all(isinstance(layer, FSDPModule) for layer in self.model.backbone.model.layers)
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        super().save_model(*args, **kwargs)


trainer.HierBD3LMTrainer = Trainer
train.main()
"""


def launch_sharded(folder, *arguments):
    """As `accelerate launch --config_file configs/accelerate/fsdp2.yaml` starts two processes, on the CPU."""
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    plugin = {key.upper(): str(value) for key, value in config.fsdp_config.items()}
    (folder / "script.py").write_text(SHARDED_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(folder / "script.py"), *arguments],
        env=os.environ | QUIET | plugin | {"ACCELERATE_USE_FSDP": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("muon", [{}, {"muon_learning_rate": 0.02}], ids=["adamw", "muon"])
def test_two_processes_with_sharded_weights_train_as_one_and_save_a_whole_checkpoint(tmp_path, monkeypatch, muon):
    launch_sharded(tmp_path, write_settings(tmp_path, **muon))
    alone = write_settings(tmp_path / "alone", per_device_train_batch_size=4, **muon)
    monkeypatch.setattr(sys, "argv", ["train.py", alone])
    train.main()
    expected = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "alone" / "out").state_dict()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        weights = AutoModel.from_pretrained(folder, trust_remote_code=True).state_dict()
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_that_is_resumed_ends_with_the_same_weights(tmp_path):
    launch_sharded(tmp_path, write_settings(tmp_path))
    again = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2")]
    launch_sharded(tmp_path, str(tmp_path / "settings.yaml"), *again)
    whole, resumed = (
        HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / folder).state_dict() for folder in ("out", "again")
    )
    start = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "out" / "checkpoint-2").state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not any(torch.equal(start[name], whole[name]) for name in whole if "proj" in name)


# The benchmarks of a GPU


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_in_small(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", "--tiny", "--output", str(tmp_path / "gpu.json")]
    environment = os.environ | QUIET | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["attention"]["flex - sdpa, largest nats"] < 0.05  # nats, in bfloat16
    assert 0.5 <= results["attention"]["compiled steps, share of equal tokens"] <= 1  # the question is half of it
    assert {*results["training"]} == {"problems", "text"} and {*results["head"]} >= {"2^24", "2^27"}
    assert all(case["tokens_per_second"] > 0 for case in results["generation"]["batch 8"].values())


@pytest.mark.slow
def test_the_gpu_benchmark_goes_on_piece_by_piece_and_reports_test_accuracy(tmp_path):
    for split, letters in (("train", "abcdefghijkl"), ("test", "xyz")):
        rows = [
            {"question": f"{letter} {letter * 2} {letter * 3}: 2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
            for letter in letters
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | QUIET | {"GSM8K_DIR": str(tmp_path), "OUTPUT": str(tmp_path / "gpu")}
    environment |= {"PYTHON": sys.executable, "EVALUATION": "--max_plan_len 16 --max_execution_len 16 --device cpu"}
    settings = {"max_steps": 2, "use_cpu": True, "bf16": False, "backbone": json.dumps(TINY_BACKBONE)}
    settings |= {"num_synthetic_examples": 8, "dataset_num_proc": 1, "num_validation_examples": 2}
    settings |= {"per_device_train_batch_size": 4, "vocab_size": 400}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def piece(minutes):
        command = ["bash", "benchmarks/gpu_gsm8k.sh", *arguments]
        return subprocess.run(
            command, env=environment | {"MINUTES": minutes}, cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    early = piece("0")
    assert early.returncode == 75 and "run the command again" in early.stderr
    whole = piece("5")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for name in ("hier", "ar"):
        line = next(line for line in whole.stdout.splitlines() if line.startswith(f"{tmp_path}/gpu/{name}: strict"))
        assert "flexible" in line and line.endswith("n = 3")
        config = json.loads((tmp_path / "gpu" / name / "config.json").read_text())
        assert config["algorithm"] == name
    folder = tmp_path / "gpu" / "hier"
    report = json.loads((folder / "data_report.json").read_text())
    assert (report["synthetic"]["num_kept"], report["train"]["num_near_test"]) == (8, 0)
    written = (folder / "eval" / "summary.json").stat().st_mtime_ns
    (folder / "trainer_state.json").unlink()  # as if the piece had ended after the last step
    assert piece("5").returncode == 0
    assert (folder / "trainer_state.json").is_file()
    assert (folder / "eval" / "summary.json").stat().st_mtime_ns == written  # what is done is not done again
