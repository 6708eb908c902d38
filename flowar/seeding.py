"""Seeds derived from what a number is for, so that no draw depends on what was drawn before it."""

import numpy as np


def derive_seed(*key: int) -> int:
    """Return a 64-bit seed that is a function of `key` alone, for example (run seed, step) or (seed, image)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
