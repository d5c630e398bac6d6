"""Plans are written by the real server of transformers, with a random model."""

import importlib.util
import re
import subprocess
import sys
from collections import Counter

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hierbd3lm.data.plans.arguments import WritePlansArguments
from hierbd3lm.data.plans.filters import FILTERS
from hierbd3lm.data.plans.run import write_plans

from .tiny_plans import NUM_PROBLEMS, NUM_SAMPLES, read_lines, results_of, write_problems
from .tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


@pytest.fixture
def random_checkpoint(tmp_path):
    """A chat model that knows nothing; one token in sixteen ends its reply."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ends = list(range(0, len(tokenizer), 16))
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    folder = str(tmp_path / "checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def transformers_serve(random_checkpoint):
    """The URL of `transformers serve` with the random checkpoint."""
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", random_checkpoint]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--log-level", "info"]
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if url := re.search(r"running on (http://127.0.0.1:\d+)", line):
                    break
            assert url, "".join(printed)
            yield f"{url[1]}/v1"
        finally:
            process.kill()


@pytest.mark.slow
def test_random_model_behind_transformers_serve_gets_every_plan_rejected(
    random_checkpoint, transformers_serve, tmp_path
):
    # one request at a time: this server has one random generator for all
    fields = {"base_url": transformers_serve, "model": random_checkpoint, "max_tokens": 16, "concurrency": 1}
    fields |= {"dataset": write_problems(tmp_path), "num_samples": NUM_SAMPLES, "max_retries": 0}
    args = WritePlansArguments(**fields, output_dir=str(tmp_path / "plans"), fallback="rule")
    summary = write_plans(args)
    replies, _ = results_of(args.output_dir)
    assert len(replies) == summary["num_replies"] == NUM_PROBLEMS * NUM_SAMPLES
    assert (summary["num_accepted"], summary["num_plans_by_rule"]) == (0, NUM_PROBLEMS)
    reasons = Counter(reply["rejected_by"] for reply in read_lines(args.output_dir, "rejected.jsonl"))
    assert reasons.total() == len(replies)
    assert summary["rejected_by"] == {name: reasons[name] for name in FILTERS}
    assert reasons["too_long"] == sum(reply["is_cut_off"] and reply["text"].strip() != "" for reply in replies) > 0
    assert reasons["not_steps"] > 0

    assert len({reply["text"] for reply in replies}) > NUM_PROBLEMS, "replies are drawn"
    write_plans(WritePlansArguments(**fields, output_dir=str(tmp_path / "again")))
    assert results_of(tmp_path / "again")[0] == replies, "the server takes the seeds"
