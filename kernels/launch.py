"""A kernel with its arguments, as data: launched on a device, interpreted, or compiled ahead for any chip."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch of a kernel.

    `arguments` are tensors, tuples of them and integers by the kernel's names, `constants` its
    `tl.constexpr`. Made from tensors on any device, "meta" included, so that what is compiled ahead is what a
    device runs. `registers` is what a thread may have on NVIDIA: left to itself, the compiler spills some to
    fit more threads.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | tuple[Tensor, ...] | int | None]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    registers: int | None = None

    def options(self, hip: bool) -> dict[str, int]:
        """The compiler's options; HIP has no bound on registers."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if hip or self.registers is None else found | {"maxnreg": self.registers}

    def run(self) -> None:
        """Launch on the current stream of the device of the tensors; an empty grid does nothing."""
        if 0 in self.grid:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        if device.type == "cpu":
            self.kernel[self.grid](**self.arguments, **self.constants)
            return
        with torch.cuda.device(device):
            options = self.options(torch.version.hip is not None)
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def precision() -> str:
    """How matrix products take float32, after `torch.get_float32_matmul_precision()`; exact on HIP."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def block(n: int, least: int = 16) -> int:
    """The power of two that holds n, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def shift(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The bias of a norm as kernels read it: zeros where a norm has none, nothing where there is no norm."""
    return torch.zeros_like(weight) if bias is None and weight is not None else bias
