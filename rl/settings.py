"""Settings of reinforcement learning that need no import of torch."""

from dataclasses import dataclass, field

from ..data.arguments import check_at_least
from ..training.settings import AdapterArguments

SEGMENT, SEQUENCE = CREDITS = ("segment", "sequence")
BOUND, UNIFORM, TRAJECTORY = LOG_PROBS = ("bound", "uniform", "trajectory")


@dataclass
class RolloutArguments:
    """Settings of sampling, scoring and credit."""

    num_plans: int = field(default=4, metadata={"help": "Number of plans sampled for each question."})
    executions_per_plan: int = field(default=4, metadata={"help": "Number of executions sampled for each plan."})
    credit: str = field(
        default=SEGMENT,
        metadata={
            "help": "`segment`: plan tokens get the advantage of their plan's mean reward among the plans, execution "
            "tokens that of their own reward among the executions of the same plan. `sequence`: all tokens get the "
            "advantage of their sample among all of the question."
        },
    )
    num_noise_draws: int = field(
        default=1, metadata={"help": "Pairs of complementary masks for a log-probability; no effect on blocks of one."}
    )
    log_probs: str = field(
        default=BOUND,
        metadata={
            "help": "How a token is scored in blocks of several. `bound`: so that log-probabilities estimate the "
            "likelihood bound. `uniform`: less variance, biased. `trajectory`: at the step that denoised it, without "
            "noise; takes as many noisy copies as a block had steps."
        },
    )
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Generation settings of the rollouts, such as `{'sampler': 'confidence'}`."}
    )

    def check_rollouts(self) -> None:
        """Raise a `ValueError` for a value out of its range."""
        for name in ("num_plans", "executions_per_plan", "num_noise_draws"):
            check_at_least(name, getattr(self, name), 1)
        for name, known in (("credit", CREDITS), ("log_probs", LOG_PROBS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, but got {getattr(self, name)!r}")
        if self.log_probs == TRAJECTORY and self.num_noise_draws != 1:
            raise ValueError(
                f"`num_noise_draws` must be 1 with log_probs='trajectory', which has no noise, but got "
                f"{self.num_noise_draws}"
            )
        if self.credit == SEGMENT and min(self.num_plans, self.executions_per_plan) < 2:
            raise ValueError(
                f"`num_plans` and `executions_per_plan` must be >= 2 with credit='segment', which compares plans and "
                f"executions apart, but got {self.num_plans} and {self.executions_per_plan}"
            )


@dataclass
class PolicyArguments(AdapterArguments):
    """The model to train, and what it is rewarded for."""

    init_from: str | None = field(
        default=None, metadata={"help": "Checkpoint or adapter of a model that plans first, to start from."}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Block size to train with, in place of the checkpoint's; with 1 log-probabilities are exact."
        },
    )
    rewards: list[str] = field(
        default_factory=lambda: ["exact_match"],
        metadata={
            "help": "Rewards of rl/rewards.py, or of your own as `module:function`; `reward_weights` holds a weight "
            "for each."
        },
    )

    def __post_init__(self):
        if self.init_from is None:
            raise ValueError("`init_from` must be a checkpoint of a model that plans first, but got None")
        if not self.rewards:
            raise ValueError("`rewards` must name at least one function, but got []")
