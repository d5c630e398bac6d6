"""Sampler of batches grouped by length."""

from collections.abc import Callable, Iterator

from transformers.trainer_pt_utils import LengthGroupedSampler

from .seeding import seeded_generator


class EpochLengthSampler(LengthGroupedSampler):
    """Sampler of batches grouped by length, in an order that depends only on the random seed and the epoch.

    The order of the base class depends on the state of torch's global generator: a resumed run would repeat some
    examples of its epoch and miss others, as would processes whose generators have diverged.

    Args:
        epoch: function that returns the number of the current epoch; called when an iteration starts.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = seeded_generator("cpu", self.seed, self.epoch())
        return super().__iter__()
