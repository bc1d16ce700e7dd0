"""How many products the refinement of an SVD has: what is counted where a kernel holds them all."""

from __future__ import annotations

from . import refine as formula

FIRST = 16  # active columns of `approx_svd` are this many, or twice, four times, ... as many, or rank
SCOUT = 2  # steps after which that many are judged


def _roots(iterations: int) -> int:
    return 3 * iterations - 3


def _fill(n: int, k: int, c: int) -> int:
    """Complex multiply-adds that make c columns orthonormal, and orthogonal to k others."""
    rounds = formula.ROUNDS
    root = _roots(formula.FILL)
    return (
        (3 * rounds + 6) * n * c * c
        + ((rounds + 1) * root + 2 * rounds) * c**3
        + 2 * (rounds + 1) * n * k * c
    )


def _diagonals(k: int, sweeps: int, tied: bool) -> int:
    return ((6 if tied else 10) * sweeps + (1 if tied else 2) * (sweeps - 1)) * k**3


def step_products(M: int, N: int, k: int, sweeps: int, tied: bool) -> int:
    """Complex multiply-adds of a step."""
    rows = M if tied else M + N
    expand = 4 * rows * k * k + (1 if tied else 2) * (1 + _roots(formula.POLISH)) * k**3
    return (1 if tied else 2) * M * N * k + M * k * k + _diagonals(k, sweeps, tied) + expand


def close_products(M: int, N: int, k: int, sweeps: int, tied: bool) -> int:
    """Complex multiply-adds of the closing."""
    rows = M if tied else M + N
    straight = 4 * rows * k * k + (1 if tied else 2) * (3 + _roots(formula.CLOSE)) * k**3
    return M * N * k + M * k * k + _diagonals(k, sweeps, tied) + k**3 + straight


def products(M: int, N: int, r: int, k: int, steps: int, sweeps: int, tied: bool, orthonormal: bool) -> int:
    """Complex multiply-adds a sample of the reference, where none of its iterations is cut short."""
    total = steps * step_products(M, N, k, sweeps, tied) + close_products(M, N, k, sweeps, tied)
    for n in (M,) if tied else (M, N):
        total += 0 if orthonormal else _fill(n, 0, k)
        total += _fill(n, k, r - k) + 2 * n * k * (r - k) if r > k else 0
    return total


def short_completion(n: int, k: int, c: int) -> int:
    """Complex multiply-adds of `complete_from_dft`: c columns beside k, where it need not begin anew."""
    # columns outside the span, its part taken out again, and the last iteration
    outside = 3 * n * k * c + 2 * n * c * c
    if c <= k:
        return outside + k * c * c + n * c * c + _roots(formula.FILL) * c**3
    return outside + 2 * n * k * c + 2 * k * k * c + (1 + 4 * (formula.FILL - 1)) * k**3


def approx_products(
    M: int, N: int, rank: int, steps: int, active: int, columns: int, tied: bool, denoise: bool
) -> int:
    """Complex multiply-adds of a sample of `approx_svd` that took so many columns, none cut short."""
    first = min(FIRST, rank)

    def judged(k: int) -> int:
        return M * N * k + (2 * M * k * k if tied and denoise else 0)

    k, total, left = active or first, 0, steps
    while not active and k < rank:
        scout = min(SCOUT, max(left - 1, 0))
        total += products(M, N, k, k, scout, formula.SWEEPS, tied, True) + judged(k)
        left -= scout
        if k >= columns:
            break
        more = min(2 * k, rank) - k
        total += 2 * M * N * k * (1 if tied else 2)
        total += sum(_fill(n, k, more) + 2 * n * k * more for n in ((M,) if tied else (M, N)))
        k += more
    total += products(M, N, rank, k, left, formula.SWEEPS, tied, True)
    return total + (judged(k) if tied and denoise else 0)
