"""The backbone that published DiT-type checkpoints become: a GPT-NeoX without parallel residuals, its head biased."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM


class HierBD3LMDiTConfig(GPTNeoXConfig):
    """
    Configuration of a [`HierBD3LMDiTForCausalLM`]: a `GPTNeoXConfig` with other defaults.

    They are those of the published models: 12 layers of 768 in 12 heads, LayerNorm before attention and before an MLP
    of 4 x 768 with tanh GELU, rotary embeddings over whole heads, no bias in attention.
    """

    model_type = "hierbd3lm_dit"

    vocab_size: int = 50258
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_parallel_residual: bool = False
    attention_bias: bool = False

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
        super().__post_init__(**kwargs)


class HierBD3LMDiTForCausalLM(GPTNeoXForCausalLM):
    """A DiT of Peebles and Xie (2023) whose condition is a constant, which is a decoder with a bias in its head."""

    config: HierBD3LMDiTConfig

    def __init__(self, config: HierBD3LMDiTConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()


# A checkpoint's code may be imported several times in a process: once with the configuration, once with the model.
AutoConfig.register(HierBD3LMDiTConfig.model_type, HierBD3LMDiTConfig, exist_ok=True)
AutoModelForCausalLM.register(HierBD3LMDiTConfig, HierBD3LMDiTForCausalLM, exist_ok=True)
