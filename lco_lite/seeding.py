"""Random numbers by name: what is drawn depends on the seed and on what it is for, never on what was drawn before."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator


def derive(seed: int, *names: object) -> int:
    """A seed in 0..2^63-1 for this purpose, e.g. ``derive(0, "rollout", step)``."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """torch's random numbers come from this seed inside, and go on as before outside."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, *names))
        yield
