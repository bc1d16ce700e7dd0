"""One matrix far larger than the memory allowed: `python benchmarks/large_neural_svd.py [--side 20000]`.

A low-rank matrix in noise, float32, made block by block: as a callable that makes its blocks again at every
visit, or with `--map FILE` written once and read as a memory map. Prints the error against the truncated
optimum, which is known, the peak memory of the process, and the time a step. Both are held: the error within
1.05 of the optimum, the memory within 2 GB.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lomacs_fast import neural_svd
from lomacs_fast.data.files import NpyWriter, atomic_path
from lomacs_fast.data.seeding import derive_seed

NOISE = 0.05  # of the whole in the Frobenius norm


class LowRankInNoise:
    """`U diag(s) V^T` and independent noise, the same at every visit: blocks of whole tiles of rows."""

    def __init__(self, side: int, rank: int, seed: int = 0, tile: int = 250) -> None:
        self.shape, self.dtype, self.seed, self.tile = (side, side), torch.float32, seed, tile
        generator = torch.Generator().manual_seed(seed)
        self.U, self.V = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for _ in range(2))
        self.s = 0.85 ** torch.arange(rank, dtype=torch.float32)
        self.sigma = NOISE * float(self.s.square().sum().sqrt()) / side

    def __call__(self, rows: Any, columns: Any) -> Tensor:
        begin, end, _ = rows.indices(self.shape[0])
        X = (self.U[begin:end] * self.s) @ self.V.T
        for first in range(begin - begin % self.tile, end, self.tile):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, first) & (2**63 - 1))
            noise = torch.randn(self.tile, self.shape[1], generator=generator)
            low, high = max(first, begin), min(first + self.tile, end)
            X[low - begin : high - begin].add_(noise[low - first : high - first], alpha=self.sigma)
        return X[:, columns]

    def optimum(self, rank: int) -> float:
        """About the relative error of the best approximation: noise adds to every squared singular value.

        A lower bound: of the energy outside the low-rank part, the best approximation takes at most `rank`
        of the noise's largest squares, 4 side sigma^2 each.
        """
        side = self.shape[0]
        outside = self.sigma**2 * side * (side - 4 * rank) + float(self.s[rank:].square().sum())
        whole = float(self.s.square().sum()) + self.sigma**2 * side * side
        return (outside / whole) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tol", type=float, default=3e-2, help="relative step at which it ends")
    parser.add_argument("--map", type=Path, default=None, help="file to write and read as a memory map")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = LowRankInNoise(args.side, args.rank)
    H: Any = made
    if args.map is not None:
        if not args.map.exists():
            # through a file, not a map, whose pages would count as memory
            with atomic_path(args.map) as temporary, NpyWriter(temporary, made.shape, np.float32) as file:
                for i in range(0, args.side, made.tile):
                    file.write(i, made(slice(i, i + made.tile), slice(None)).numpy())
        H = np.load(args.map, mmap_mode="r")
    begin = time.perf_counter()
    found = neural_svd(
        H,
        args.rank,
        tol=args.tol,
        progress=args.progress,
        checkpoint=args.checkpoint,
        resume=args.resume,
    )
    seconds = time.perf_counter() - begin
    if int(os.environ.get("RANK", "0")):
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = made.optimum(args.rank)
    print(f"{args.side}x{args.side} float32, rank {args.rank}, {'memory map' if args.map else 'callable'}")
    print(f"method {found.method}: {found.advice}")
    print(f"{found.steps} steps, {seconds:.0f} s; peak memory {peak:.2f} GiB")
    print(f"relative error {found.rel_error:.5f}, optimum at least {best:.5f}: {found.rel_error / best:.4f}")
    if found.rel_error > 1.05 * best or peak * 2**30 > 2e9:
        raise SystemExit("the error or the memory is beyond its bound")


if __name__ == "__main__":
    main()
