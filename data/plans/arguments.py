"""The settings of a run that has plans written."""

from dataclasses import dataclass, field

from ..arguments import check_at_least
from .writers import SamplingSettings

FALLBACKS = ("rule",)


@dataclass
class WritePlansArguments:
    """Which problems get plans, who writes them, and where they go."""

    dataset: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "`openai/gsm8k`, or a .json or .jsonl file, a folder or a dataset on the Hub with `question` "
            "and `execution`, which ends with `#### <answer>`."
        },
    )
    split: str = field(default="train", metadata={"help": "Its split; not looked at where it is a file."})
    limit: int | None = field(default=None, metadata={"help": "The first so many problems; all if omitted."})
    output_dir: str = field(default="outputs/plans", metadata={"help": "Folder of all that is written."})
    overwrite: bool = field(default=False, metadata={"help": "Throws away the run that `output_dir` holds."})

    model: str = field(
        default="meta-llama/Llama-3.1-8B-Instruct",
        metadata={"help": "Folder or id of an instruct model; with `base_url` its name on the server."},
    )
    num_samples: int = field(default=4, metadata={"help": "Plans that are written for a problem; the best is kept."})
    temperature: float = field(default=0.7, metadata={"help": "0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the tokens' distribution."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a plan."})
    structured_output: bool = field(
        default=True, metadata={"help": "Holds decoding to JSON with as many steps as the solution."}
    )
    seed: int = field(default=0, metadata={"help": "One of its own per problem and sample follows from it."})
    fallback: str | None = field(
        default=None, metadata={"help": "`rule`: a problem whose plans are all rejected gets the plan by rule."}
    )

    base_url: str | None = field(
        default=None,
        metadata={
            "help": "API of an OpenAI-compatible server, as http://localhost:8000/v1; vllm in this process if omitted."
        },
    )
    concurrency: int = field(default=16, metadata={"help": "Requests to the server that are under way at once."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds that the server's answer may take."})
    max_retries: int = field(default=10, metadata={"help": "Times that a request which fails is sent again."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model, for vllm."})

    push_to_hub: str | None = field(default=None, metadata={"help": "Id of a dataset on the Hub to upload to."})
    private: bool = field(default=False, metadata={"help": "Whether a dataset that is made there is private."})

    def __post_init__(self):
        for name in ("limit", "num_samples"):
            check_at_least(name, getattr(self, name), 1)
        if self.fallback not in (None, *FALLBACKS):
            raise ValueError(f"`fallback` must be one of {', '.join(FALLBACKS)}, but got {self.fallback!r}")
        self.sampling()

    def sampling(self) -> SamplingSettings:
        """How replies are drawn."""
        return SamplingSettings(self.temperature, self.top_p, self.max_tokens, self.structured_output)
