"""The command line of training: settings, files that a run leaves, and resumption."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hierbd3lm import train
from hierbd3lm.configuration_hierbd3lm import config_fields
from hierbd3lm.evaluation.runner import Written
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.trainer import HierBD3LMTrainer
from hierbd3lm.training import preparation
from hierbd3lm.training.preparation import load_examples, make_datasets, make_model
from hierbd3lm.training.settings import CONFIG_FIELDS, ModelArguments

from .tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).parents[1]
TINY = {
    "dataset": "synthetic",
    "num_train_examples": 24,
    "num_validation_examples": 8,
    "backbone": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    | {"num_key_value_heads": 1, "head_dim": 16},
    "question_len": 96,
    "plan_len": 32,
    "execution_len": 48,
    "block_size": 4,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
    "eval_noise_draws": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def write_config(folder, **settings):
    settings = TINY | {"output_dir": str(folder / "out")} | settings
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return str(path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()


def test_the_command_line_wins_over_the_file(tmp_path):
    config = write_config(tmp_path, plan_clip=[0.3, 0.8])
    arguments = ["--max_steps", "9", "--plan_block_size", "8", "--execution_clip", "0.2", "0.9"]
    model_args, data_args, args = train.parse_arguments([config, *arguments])
    assert (args.max_steps, args.save_steps, data_args.num_train_examples) == (9, 2, 24)
    assert model_args.plan_clip == [0.3, 0.8] and model_args.execution_clip == [0.2, 0.9]
    _, data_args, _ = train.parse_arguments([config, "--synthetic", '{"max_value": 30}'])
    assert data_args.synthetic == {"max_value": 30}


@pytest.mark.parametrize("words", [["--dataset_name", "null"], ["--dataset-name=null"]])
def test_null_unsets_a_setting_of_the_recipe(words, tmp_path):
    config = write_config(
        tmp_path, dataset="gsm8k", dataset_name="socratic", plan_clip=[0.3, 0.8], hierarchical_mask=False
    )
    assert train.parse_arguments([config])[1].dataset_name == "socratic"
    others = ["--plan_clip", "null", "--hierarchical_mask", "null", "--num_train_examples", "null"]
    model_args, data_args, _ = train.parse_arguments([config, *words, *others])
    assert data_args.dataset_name is data_args.num_train_examples is None
    assert model_args.plan_clip is model_args.hierarchical_mask is None
    assert model_args.backbone == TINY["backbone"]
    assert train.parse_arguments([config, "--dataset_test_split", "null"])[1].dataset_test_split is None


def test_setting_that_cannot_be_null_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset` must have a value .*, but got 'null'"):
        train.parse_arguments([write_config(tmp_path), "--dataset", "null"])


def test_recipe_in_another_encoding_is_refused_with_its_line(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"max_steps: 3\noutput_dir: caf\xe9\n")
    with pytest.raises(ValueError, match=r"line 2 of .*a\.yaml must be UTF-8"):
        train.parse_arguments([str(tmp_path / "a.yaml")])


def test_a_misspelt_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_stepz"):
        train.parse_arguments([write_config(tmp_path, max_stepz=3)])


@pytest.mark.slow
@pytest.mark.parametrize("setting", [["--algorithm", "sedd"], ["--algorithm", "ar"], ["--joint", "true"]])
def test_a_recipe_trains_any_algorithm(setting, tmp_path, monkeypatch):
    run(monkeypatch, write_config(tmp_path, max_steps=1), *setting)
    config = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "out").config
    assert str(getattr(config, setting[0][2:])).lower() == setting[1]
    assert config.plan_block_size == {"sedd": 80, "ar": 1, "true": 32}[setting[1]]


@pytest.mark.slow
def test_the_block_size_grows_in_one_command(tmp_path, monkeypatch):
    schedule = {"block_size": None, "block_size_schedule": {0: 1, 0.5: 8}}
    run(monkeypatch, write_config(tmp_path, **schedule))
    sizes = [
        HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "out" / folder).config.plan_block_size
        for folder in ("checkpoint-2", "checkpoint-4", "")
    ]
    assert sizes == [1, 8, 8]
    config = write_config(tmp_path, output_dir=str(tmp_path / "new"), **schedule)
    with pytest.raises(ValueError, match=r"`plan_block_size` must be omitted or 8, the largest .*, but got 4"):
        run(monkeypatch, config, "--plan_block_size", "4")
    run(monkeypatch, config, "--algorithm", "ar", "--max_steps", "1")  # whose block size is always 1
    arguments = train.parse_arguments([config, "--block_size_schedule", "{0: 2, 3: 4}"])
    assert arguments[2].block_size_schedule == {0: 2, 3: 4}
    assert train.parse_arguments([config, "--block_size_schedule", "null"])[2].block_size_schedule is None


def test_a_run_leaves_a_checkpoint_that_says_what_it_was_trained_on(tmp_path, monkeypatch):
    run(monkeypatch, write_config(tmp_path, synthetic={"max_value": 30}))
    out = tmp_path / "out"
    model = HierBD3LMForBlockDiffusion.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out, config=model.config)
    assert len(tokenizer) == model.config.vocab_size
    for folder in (out, out / "checkpoint-2", out / "checkpoint-4"):
        assert json.loads((folder / "data_config.json").read_text())["synthetic"] == {"max_value": 30}
    assert json.loads((out / "data_report.json").read_text())["train"]["num_kept"] == 24
    assert json.loads((out / "eval_results.json").read_text())["eval_num_tokens"] > 0
    assert "train_loss" in json.loads((out / "train_results.json").read_text())
    assert (out / "modeling_hierbd3lm.py").is_file()


@pytest.mark.slow
def test_a_new_run_does_not_mix_with_an_old_one_and_last_resumes_it(tmp_path, monkeypatch):
    whole = write_config(tmp_path, output_dir=str(tmp_path / "whole"))
    run(monkeypatch, whole)
    config = write_config(tmp_path)
    run(monkeypatch, config, "--max_steps", "2", "--lr_scheduler_type", "constant")
    with pytest.raises(ValueError, match="`output_dir` must hold no checkpoints of another run"):
        run(monkeypatch, config)
    run(monkeypatch, config, "--resume_from_checkpoint", "last")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    run(monkeypatch, write_config(tmp_path, output_dir=str(tmp_path / "whole")))
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    config = write_config(tmp_path)

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    step = HierBD3LMTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HierBD3LMTrainer, "training_step", interrupt)
        run(monkeypatch, config)
    run(monkeypatch, config, "--resume_from_checkpoint", "last")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_autoregressive_checkpoint_is_converted_and_trained_further(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    backbone = Qwen3Config(vocab_size=len(tokenizer), **TINY["backbone"])
    Qwen3ForCausalLM(backbone).save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    lengths = {"question_len": 400, "plan_len": 128, "execution_len": 128}
    run(monkeypatch, write_config(tmp_path, backbone=None, init_from=str(tmp_path / "ar"), **lengths))
    again = {"backbone": None, "init_from": str(tmp_path / "out"), "output_dir": str(tmp_path / "again")}
    run(monkeypatch, write_config(tmp_path, max_steps=1, save_strategy="no", **(lengths | again)))
    assert HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "again").config.question_len == 400


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_converted_checkpoint_is_resumed_across_a_change_of_the_block_size(tmp_path, monkeypatch, use_peft):
    tokenizer = make_tokenizer()
    backbone = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **TINY["backbone"])
    LlamaForCausalLM(backbone).bfloat16().save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    settings = {"question_len": 400, "plan_len": 128, "execution_len": 128, "backbone": None, "use_peft": use_peft}
    settings |= {"init_from": str(tmp_path / "ar"), "block_size": None, "block_size_schedule": {0: 1, 3: 4}}
    run(monkeypatch, write_config(tmp_path, **settings))
    shutil.copytree(tmp_path / "out", tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-4"))
    config = write_config(tmp_path, **settings, output_dir=str(tmp_path / "resumed"))
    run(monkeypatch, config, "--resume_from_checkpoint", "last")
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    whole, resumed = (load_file(tmp_path / folder / name) for folder in ("out", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["plan_block_size"], config["prediction"]) == (4, "shifted")


def test_a_checkpoint_of_low_precision_is_trained_in_float32_unless_asked_otherwise(tmp_path):
    tokenizer = make_tokenizer()
    backbone = Qwen3Config(vocab_size=len(tokenizer), **TINY["backbone"])
    Qwen3ForCausalLM(backbone).bfloat16().save_pretrained(tmp_path / "ar")
    model = make_model(ModelArguments(init_from=str(tmp_path / "ar")), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "own")
    low = ModelArguments(init_from=str(tmp_path / "own"), dtype="bfloat16")
    assert {parameter.dtype for parameter in make_model(low, tokenizer).parameters()} == {torch.bfloat16}


def test_synthetic_problems_join_another_dataset_and_are_counted(tmp_path):
    rows = [{"question": f"{i} cats", "plan": "count", "execution": f"#### {i}"} for i in range(9)]
    rows[3]["execution"] = "so " * 100 + rows[3]["execution"]
    Path(tmp_path, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "num_synthetic_examples": 20, "num_train_examples": None}
    arguments = train.parse_arguments([write_config(tmp_path, num_validation_examples=2, **settings)])
    model_args, data_args, args = arguments
    examples = load_examples(data_args, args)
    tokenizer = preparation.make_tokenizer(model_args, data_args, args, examples)
    assert {" cats", " has"} < set(tokenizer.get_vocab())
    config = make_model(model_args, tokenizer).config
    datasets = make_datasets(data_args, args, examples, tokenizer, config)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert {name: (part["num_kept"], part["num_dropped"]) for name, part in report.items()} == {
        "train": (6, 1),
        "synthetic": (20, 0),
        "validation": (2, 0),
    }
    assert (len(datasets["train"]), len(datasets["validation"])) == (26, 2)
    written = tokenizer.batch_decode(datasets["train"]["question_ids"][:7])
    assert written[:6] == [f"{i} cats" for i in (0, 1, 2, 4, 5, 6)] and "How many" in written[6]


@pytest.mark.parametrize("dtype", ["bf16", "float8"])
def test_a_precision_that_does_not_exist_is_refused(dtype):
    with pytest.raises(ValueError, match=f"`dtype` must be one of float32, bfloat16, .*, but got '{dtype}'"):
        ModelArguments(dtype=dtype)


def test_every_field_of_the_configuration_is_a_setting():
    from_elsewhere = {"backbone_config", "tie_word_embeddings", "chat_template"}  # the last has a third value, `auto`
    names = {name for name in config_fields() if not name.endswith("_token_id")}
    assert set(CONFIG_FIELDS) == names - from_elsewhere
    assert set(CONFIG_FIELDS) < {item.name for item in fields(ModelArguments)}


# Nothing is lost


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_an_example_that_fits_stops_the_run_before_training(tmp_path, monkeypatch, split):
    rows = [{"question": "a cat", "plan": "count", "execution": "#### 1"} for _ in range(6)]
    for row in {"train": rows[:4], "validation": rows[4:]}[split]:
        row["execution"] = "so " * 100
    Path(tmp_path, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "num_train_examples": None, "num_validation_examples": 2}
    message = f"the {split} split must have at least one example that fits .*'execution_len': 48.*'num_kept': 0"
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, write_config(tmp_path, **settings))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_model_is_saved_before_the_evaluation_after_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no evaluation")

    config = write_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no evaluation"):
        patch.setattr(HierBD3LMTrainer, "evaluate", fail)
        run(monkeypatch, config)
    out = tmp_path / "out"
    HierBD3LMForBlockDiffusion.from_pretrained(out)
    assert (out / "data_config.json").is_file() and (out / "train_results.json").is_file()
    assert not (out / "trainer_state.json").exists()  # the last file of a run
    train_results = (out / "train_results.json").read_text()
    run(monkeypatch, config, "--resume_from_checkpoint", "last")
    assert "eval_nll" in json.loads((out / "eval_results.json").read_text())
    assert (out / "trainer_state.json").is_file()
    assert (out / "train_results.json").read_text() == train_results


@pytest.mark.slow
def test_resuming_a_finished_run_trains_no_further_step(tmp_path, monkeypatch):
    config = write_config(tmp_path, num_train_examples=40)  # ten steps an epoch: the run ends inside one
    run(monkeypatch, config)
    out = tmp_path / "out"
    files = ("model.safetensors", "train_results.json", "eval_results.json", "trainer_state.json")
    before = [(out / name).read_bytes() for name in files]
    steps = []
    monkeypatch.setattr(HierBD3LMTrainer, "training_step", lambda trainer, *args, **kwargs: steps.append(1))
    run(monkeypatch, config, "--resume_from_checkpoint", "last")
    after = [(out / name).read_bytes() for name in files]
    assert before[:2] == after[:2] and before[3] == after[3] and not steps
    old, new = (json.loads(text) for text in (before[2], after[2]))
    assert old["eval_nll"] == new["eval_nll"]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_a_run_prints_no_warnings_that_do_not_apply(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = write_config(tmp_path, backbone=TINY["backbone"] | {"tie_word_embeddings": True})
    run(monkeypatch, config, "--max_steps", "2", "--lr_scheduler_type", "constant")
    run(monkeypatch, config, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "last")
    for text in ("new PAD/BOS/EOS", "missing keys"):
        assert text not in caplog.text
    logging.getLogger("transformers.trainer_utils").warning("The log is read.")
    assert "The log is read." in caplog.text


def test_plans_of_none_train_a_tokenizer_and_a_model(tmp_path, monkeypatch):
    rows = [{"question": f"{i} cats", "plan": "count" if i else None, "execution": f"#### {i}"} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"dataset": str(path), "num_validation_examples": 1, "num_train_examples": None, "max_steps": 1}
    run(monkeypatch, write_config(tmp_path, save_strategy="no", **fields))
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["train"]["num_kept"] == 8
    rows[3]["execution"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 3 of .*rows\.jsonl: `execution` must be a string, but got None"):
        run(monkeypatch, write_config(tmp_path, output_dir=str(tmp_path / "again"), **fields))
    assert not (tmp_path / "again" / "tokenizer").exists()


def test_a_backbone_and_a_checkpoint_exclude_each_other():
    with pytest.raises(ValueError, match="`backbone` must be None with `init_from`"):
        ModelArguments(init_from="somewhere", backbone={"hidden_size": 8})


@pytest.mark.slow
def test_two_processes_train_together_through_gloo(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += [str(ROOT / "train.py"), write_config(tmp_path, per_device_train_batch_size=2)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 4
    model = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.slow
def test_accelerate_launches_the_script(tmp_path):
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", "--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += [str(ROOT / "train.py"), write_config(tmp_path), "--max_steps", "1"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_train_examples": None}, "`num_train_examples` must be given for the synthetic problems"),
        ({"backbone": {"model_type": "qwen33"}}, "`backbone` must have a `model_type` that transformers knows"),
        ({"dataset": "missing.jsonl"}, "`dataset` must be an existing"),
        ({"dataset": "rows.jsonl", "dataset_name": "main"}, "`dataset_name` must be None for a file"),
        (
            {"resume_from_checkpoint": "nowhere"},
            "`resume_from_checkpoint` must be the folder of a checkpoint, or `last`",
        ),
    ],
)
def test_errors_name_the_settings_of_the_command_line(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "a", "plan": "b", "execution": "#### 1"}\n')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(monkeypatch, write_config(tmp_path, **settings))


def test_every_evaluation_answers_problems(tmp_path, monkeypatch, capsys):
    settings = {"eval_answers": 100, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.5}
    run(monkeypatch, write_config(tmp_path, **settings))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [line["eval_exact_match"] for line in state["log_history"] if "eval_exact_match" in line]
    assert len(rates) == 3 and all(0 <= rate <= 1 for rate in rates)
    printed = capsys.readouterr().out
    assert printed.count("Step 2 of 4: ") == 1 and "of 8 problems right, NELBO " in printed


def test_answers_of_an_evaluation_are_those_of_the_averaged_model(tmp_path, monkeypatch):
    """Right answers are counted: here those of a model that writes the reference."""
    answered = []

    def write_references(model, problems, settings, tokenizer):
        answered.append({name: weight.clone() for name, weight in model.named_parameters()})
        texts = [f"#### {problem.reference_answer if problem.index % 3 else 'none'}" for problem in problems]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [Written([], one, True, 1, 1.0, []) for one in ids]

    monkeypatch.setattr("hierbd3lm.evaluation.runner.generate_batch", write_references)
    settings = {"eval_answers": 8, "per_device_eval_batch_size": 4, "ema_decay": 0.9, "learning_rate": 0.1}
    run(monkeypatch, write_config(tmp_path, **settings))
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_exact_match"] == 5 / 8  # all but the problems 0, 3 and 6
    saved = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path / "out")
    assert len(answered) == 2  # batches of 4
    for name, weight in saved.named_parameters():
        assert torch.equal(answered[-1][name], weight)


def test_negative_number_of_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_answers` must be at least 0, but got -1"):
        train.parse_arguments([write_config(tmp_path, eval_answers=-1)])


def test_plain_text_is_not_answered(tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one two three"}\n' * 12)
    settings = {"dataset": str(texts), "text_column": "text", "num_validation_examples": 4, "eval_answers": 3}
    settings |= {"question_len": 0, "plan_len": 0, "execution_len": 64}
    with pytest.raises(ValueError, match=r"`eval_answers` must be 0 for .* plain text.*, but got 3"):
        run(monkeypatch, write_config(tmp_path, **settings))
