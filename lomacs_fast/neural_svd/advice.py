"""When a direct method is the better choice: said honestly, and taken by `method="auto"`."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Advice", "advise"]

SMALL = 512  # up to this many rows or columns LAPACK takes well under a second
WIDE = 4  # a rank of more than a fourth of the smaller side leaves nothing to save
NARROW = 8  # in a batch of small matrices the steps win below an eighth of the smaller side
LEAST = 16  # matrices, from which a batch is more than its calls


class Advice(NamedTuple):
    """`method`: "optimize", "svd" (`torch.linalg.svd`) or "lowrank" (`torch.svd_lowrank`), and the reason."""

    method: str
    reason: str


def advise(M: int, N: int, rank: int, *, matrices: int | None = None, in_memory: bool = True) -> Advice:
    """The cheapest way to the leading triplets.

    Args:
        M, N, rank: of every matrix.
        matrices: how many there are in a batch; None for one matrix.
        in_memory: whether the matrix is a tensor.
    """
    small = min(M, N)
    if not in_memory:
        return Advice("optimize", "the matrix is not in memory, and no direct method reads it in pieces")
    if matrices is not None and matrices >= LEAST and rank * NARROW <= small:
        return Advice("optimize", f"{matrices} small matrices at rank {rank} of {small} are fastest together")
    if small <= SMALL or rank * WIDE > small:
        return Advice(
            "svd",
            f"torch.linalg.svd (LAPACK) gives all {small} triplets of {M}x{N} exactly and is faster here "
            "than an optimisation",
        )
    return Advice(
        "lowrank",
        f"torch.svd_lowrank gives {rank} of {small} triplets of a matrix in memory with a few products and "
        "is faster here than an optimisation",
    )
