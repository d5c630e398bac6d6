"""The order of examples in batches of like lengths."""

from collections.abc import Callable, Iterator

from transformers.trainer_pt_utils import LengthGroupedSampler

from .seeding import seeded_generator


class EpochLengthSampler(LengthGroupedSampler):
    """Batches of like lengths, in an order that depends on seed and epoch only.

    The order of its base class depends on all that torch's global generator was used for before: a resumed run would
    repeat some examples of its epoch and miss others, and so would processes whose generators are not in step.

    Args:
        epoch: gives the number of the epoch when its iteration starts.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = seeded_generator("cpu", self.seed, self.epoch())
        return super().__iter__()
