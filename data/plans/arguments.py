"""Settings of a run that writes plans with a language model."""

from dataclasses import dataclass, field

from ..arguments import check_at_least
from .writers import SamplingSettings

FALLBACKS = ("rule",)


@dataclass
class WritePlansArguments:
    """Problems, language model and output of a run that writes plans."""

    dataset: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "`openai/gsm8k`, or a .json or .jsonl file, a folder or a dataset on the Hub with `question` "
            "and `execution`, which ends with `#### <answer>`."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset; ignored for a file."})
    limit: int | None = field(
        default=None, metadata={"help": "Maximum number of problems, taken from the start; all if omitted."}
    )
    output_dir: str = field(default="outputs/plans", metadata={"help": "Output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in `output_dir`."})

    model: str = field(
        default="meta-llama/Llama-3.1-8B-Instruct",
        metadata={"help": "Folder or Hub id of an instruct model; with `base_url`, its name on the server."},
    )
    num_samples: int = field(default=4, metadata={"help": "Number of plans written per problem; the best is kept."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the token distribution."})
    max_tokens: int = field(default=512, metadata={"help": "Maximum number of tokens of a plan."})
    structured_output: bool = field(
        default=True, metadata={"help": "Constrain decoding to JSON with as many steps as the solution."}
    )
    seed: int = field(
        default=0, metadata={"help": "Random seed, from which the seed of each problem and sample is derived."}
    )
    fallback: str | None = field(
        default=None, metadata={"help": "`rule`: use the rule-based plan if all plans of a problem are rejected."}
    )

    base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible API, such as http://localhost:8000/v1; if omitted, vllm runs in this "
            "process."
        },
    )
    concurrency: int = field(default=16, metadata={"help": "Maximum number of concurrent requests to the server."})
    timeout: float = field(default=120.0, metadata={"help": "Timeout of a request, in seconds."})
    max_retries: int = field(default=10, metadata={"help": "Maximum number of retries of a failed request."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "Number of GPUs for tensor parallelism in vllm."})

    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id of the dataset to upload to."})
    private: bool = field(default=False, metadata={"help": "Make a new dataset on the Hub private."})

    def __post_init__(self):
        for name in ("limit", "num_samples"):
            check_at_least(name, getattr(self, name), 1)
        if self.fallback not in (None, *FALLBACKS):
            raise ValueError(f"`fallback` must be one of {', '.join(FALLBACKS)}, but got {self.fallback!r}")
        self.sampling()

    def sampling(self) -> SamplingSettings:
        """Return the settings for sampling replies."""
        return SamplingSettings(self.temperature, self.top_p, self.max_tokens, self.structured_output)
