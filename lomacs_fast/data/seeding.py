"""Seeds of single samples: every random draw is a pure function of a few integers."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014): a bijective mixing of 64 bits."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def derive_seed(*keys: int) -> int:
    """A well-mixed 64-bit seed from integers, in order: `derive_seed(seed, epoch, index)`."""
    state = 0
    for key in keys:
        state = splitmix64(state ^ (key & _MASK))
    return state
