"""Where the package is installed, the Auto classes of transformers know its model without code of the checkpoint."""

import subprocess
import sys

import pytest
import torch

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_config, make_model
from .tiny_autoregressive import convert

LOAD = """
config, model, causal = (auto.from_pretrained({folder!r}) for auto in (AutoConfig, AutoModel, AutoModelForCausalLM))
assert type(config).__module__ == "hierbd3lm.configuration_hierbd3lm", type(config).__module__
assert type(model).__module__ == type(causal).__module__ == "hierbd3lm.modeling_hierbd3lm", type(model).__module__
print(model.generate(torch.tensor([[6, 7, 8]]), max_plan_len=4, max_execution_len=4).sequences.tolist())
"""
AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM"
ORDERS = {
    "package first": f"import hierbd3lm\nimport torch\n{AUTO}",
    "transformers first": f"import torch\n{AUTO}\nAutoModel, AutoConfig\nimport hierbd3lm",
    "a name of the package": f"from hierbd3lm import HierBD3LMTrainer\nimport torch\n{AUTO}",
    "a module that others need": f"import torch, hierbd3lm.backbones_hierbd3lm, hierbd3lm.train\n{AUTO}",
    "threads": f"""import hierbd3lm, threading, torch
def load():
    import transformers
    transformers.AutoModel, transformers.AutoConfig
threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
{AUTO}""",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_is_loaded_without_a_question_of_trust(order, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    expected = model.generate(torch.tensor([[6, 7, 8]]), max_plan_len=4, max_execution_len=4).sequences
    code = f"{ORDERS[order]}\n{LOAD.format(folder=str(tmp_path))}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[-1] == str(expected.tolist())


def test_the_package_is_imported_without_torch_and_transformers():
    code = "import hierbd3lm, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_model_of_this_kind_is_no_backbone():
    with pytest.raises(ValueError, match="`backbone_config` must have a `model_type` that transformers knows"):
        HierBD3LMConfig(backbone_config={"model_type": "hierbd3lm"})
    with pytest.raises(ValueError, match="`backbone_config` must be of a text model"):
        HierBD3LMForBlockDiffusion(make_config(backbone_config=make_config(pad_token_id=7)))
    with pytest.raises(ValueError, match="`model_or_path` must be an autoregressive model, but got one of this kind"):
        convert(make_model())
