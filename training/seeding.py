"""Random generators that depend only on a key."""

import numpy as np
import torch


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Create a generator from a key. The same key gives the same numbers on devices of the same kind."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(seed)
