"""Random numbers that depend on a key alone."""

import numpy as np
import torch


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose numbers are the same for the same key, on devices of one kind."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(seed)
