"""The matrix to decompose, wherever it is: tensor, array, memory map, callable or linear operator."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lomacs_fast.reference.arguments import integer

__all__ = ["Blocks", "MatrixSource", "open_matrix"]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
STRIP = 1 << 25  # bytes of the rows that are read at once

Blocks = Callable[[Any, Any], Any]


class MatrixSource:
    """A matrix `M x N` of which rows and blocks can be had, or products alone.

    Attributes: `shape`, `dtype` (float32, float64, complex64 or complex128), `device`, `tensor` (the whole
    matrix where it is in memory, else None) and `has_blocks` (False for a linear operator).
    """

    tensor: Tensor | None = None
    has_blocks = True
    device = torch.device("cpu")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"H must be a matrix without an empty side, got shape {tuple(shape)}")
        if dtype not in DTYPES:
            raise TypeError(
                "H must be float32, float64, complex64 or complex128, got "
                + str(dtype).removeprefix("torch.")
            )
        self.shape, self.dtype = (int(shape[0]), int(shape[1])), dtype

    def _read(self, rows: Any, columns: Any) -> Any:
        raise NotImplementedError

    def block(self, rows: Any, columns: Any) -> Tensor:
        """The block at the crossings of rows and columns, each a slice or 1-D int64 tensor of indices."""
        sizes = tuple(
            len(range(*i.indices(n))) if isinstance(i, slice) else len(i)
            for i, n in zip((rows, columns), self.shape, strict=True)
        )
        x = self._read(rows, columns)
        x = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        if x.shape != sizes:
            raise ValueError(f"H must give a block of shape {sizes} there, got {tuple(x.shape)}")
        if x.is_complex() and not self.dtype.is_complex:
            raise TypeError(f"H must give blocks of {self.dtype}, got {x.dtype}")
        return x.to(self.dtype)

    def strips(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Neighbouring rows from `begin` to `end`, a strip at a time."""
        row = self.shape[1] * torch.empty((), dtype=self.dtype).element_size()
        height = max(1, STRIP // row)
        for i in range(begin, end, height):
            yield i, self.block(slice(i, min(i + height, end)), slice(0, self.shape[1]))
            self._release()

    def _release(self) -> None:
        """Called after a strip was used."""

    def __matmul__(self, F: Tensor) -> Tensor:
        return torch.cat([X @ F for _, X in self.strips(0, self.shape[0])])

    def adjoint(self, G: Tensor) -> Tensor:
        """`H^H G`."""
        total = G.new_zeros(self.shape[1], G.shape[-1])
        for i, X in self.strips(0, self.shape[0]):
            total += X.mH @ G[i : i + len(X)]
        return total


class _TensorSource(MatrixSource):
    def __init__(self, H: Tensor) -> None:
        super().__init__(H.shape, H.dtype)
        self.tensor, self.device = H.resolve_conj().resolve_neg(), H.device

    def _read(self, rows: Any, columns: Any) -> Tensor:
        assert self.tensor is not None
        return self.tensor[rows][:, columns]

    def strips(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        assert self.tensor is not None
        yield begin, self.tensor[begin:end]


def _plain(index: Any) -> Any:
    return index if isinstance(index, slice) else index.numpy()


class _ArraySource(MatrixSource):
    """An array, most often a memory map: pages that were read are given back after every strip."""

    def __init__(self, H: np.ndarray[Any, Any]) -> None:
        dtypes = {np.dtype(str(d).removeprefix("torch.")): d for d in DTYPES}
        native = H.dtype.newbyteorder("=")
        if native not in dtypes:
            raise TypeError(f"H must be float32, float64, complex64 or complex128, got {H.dtype}")
        super().__init__(H.shape, dtypes[native])
        self._array, self._native = H, native
        base: Any = H
        while isinstance(getattr(base, "base", None), np.ndarray):
            base = base.base
        self._map = getattr(base, "base", None)

    def _read(self, rows: Any, columns: Any) -> Any:
        found = np.asarray(self._array[_plain(rows)][:, _plain(columns)], dtype=self._native)
        # torch takes neither negative strides nor read-only memory
        return np.array(found, order="C")

    def _release(self) -> None:
        if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _CallableSource(MatrixSource):
    def __init__(self, H: Blocks, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._blocks = H

    def _read(self, rows: Any, columns: Any) -> Any:
        return self._blocks(rows, columns)


class _OperatorSource(MatrixSource):
    has_blocks = False

    def __init__(self, H: Any, dtype: torch.dtype) -> None:
        super().__init__(H.shape, dtype)
        self._operator = H

    def _product(self, operator: Any, X: Tensor, rows: int) -> Tensor:
        found = operator @ X.numpy()
        found = found if isinstance(found, Tensor) else torch.from_numpy(np.ascontiguousarray(found))
        if found.shape != (rows, X.shape[-1]):
            raise ValueError(
                f"H must give a product of shape {(rows, X.shape[-1])}, got {tuple(found.shape)}"
            )
        return found.to(self.dtype)

    def __matmul__(self, F: Tensor) -> Tensor:
        return self._product(self._operator, F, self.shape[0])

    def adjoint(self, G: Tensor) -> Tensor:
        return self._product(self._operator.adjoint(), G, self.shape[1])

    def block(self, rows: Any, columns: Any) -> Tensor:
        raise ValueError("H is a linear operator and has no blocks: net, orth and lr cannot be served by it")


def _torch_dtype(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
    except TypeError:
        raise TypeError(f"dtype must be a floating or complex type, got {dtype!r}") from None


def open_matrix(H: Any, shape: Sequence[int] | None = None, dtype: Any = None) -> MatrixSource:
    """The source of one matrix.

    Args:
        H: a tensor `(M, N)`; a NumPy array or memory map; a callable `rows, columns -> block` that takes two
            slices, or two 1-D int64 tensors of indices, and gives the block at their crossings, the same at
            every call; or a linear operator with `shape`, `@` on `(N, L)` arrays and `adjoint()`, as SciPy's.
        shape: `(M, N)`; of a callable that has no attribute of that name.
        dtype: of a callable or an operator that has none; complex64 where nothing says.

    Raises:
        TypeError, ValueError: for anything else, an empty side, or a dtype that is not float32, float64,
            complex64 or complex128.
    """
    if isinstance(H, Tensor):
        return _TensorSource(H)
    if isinstance(H, np.ndarray):
        return _ArraySource(H)
    dtype = getattr(H, "dtype", None) if dtype is None else dtype
    dtype = torch.complex64 if dtype is None else _torch_dtype(dtype)
    if hasattr(H, "shape") and hasattr(H, "adjoint") and hasattr(H, "__matmul__"):
        return _OperatorSource(H, dtype)
    if callable(H):
        shape = getattr(H, "shape", None) if shape is None else shape
        if shape is None:
            raise ValueError("shape must be given where H is a callable: the rows and columns of the matrix")
        return _CallableSource(H, [integer("shape", n) for n in shape], dtype)
    raise TypeError(
        "H must be a tensor, an array, a callable rows, columns -> block or a linear operator, "
        f"got {type(H).__name__}"
    )
