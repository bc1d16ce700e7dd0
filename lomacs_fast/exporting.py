"""The network in files of other runtimes: ONNX, through a twin in real arithmetic."""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import reference
from .data.files import atomic_path
from .reference.arguments import integer

__all__ = ["export_onnx"]

# the least that the converter writes; ONNX Runtime reads it from 1.14 on
OPSET = 18


class Complex:
    """A complex tensor as two real ones: what the reference functions run on where no complex dtype is.

    It answers to the operators, methods and torch functions that the network's stems use on complex tensors,
    and to no others: the algorithms are the reference's own, the arithmetic is handed in.
    """

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @classmethod
    def of(cls, pairs: Tensor) -> Complex:
        """From real `(..., 2)`."""
        return cls(pairs[..., 0], pairs[..., 1])

    def pairs(self) -> Tensor:
        """Real `(..., 2)`."""
        return torch.stack([self.real, self.imag], -1)

    shape = property(lambda self: self.real.shape)
    device = property(lambda self: self.real.device)
    dtype = property(lambda self: self.real.dtype)
    ndim = property(lambda self: self.real.ndim)

    def _each(self, fn: Callable[[Tensor], Tensor]) -> Complex:
        return Complex(fn(self.real), fn(self.imag))

    def numel(self) -> int:
        return self.real.numel()

    def resolve_conj(self) -> Complex:
        return self

    resolve_neg = resolve_conj

    @property
    def mH(self) -> Complex:
        return Complex(self.real.mT, -self.imag.mT)

    def __add__(self, other: Complex) -> Complex:
        return Complex(self.real + other.real, self.imag + other.imag)

    def __sub__(self, other: Complex | Tensor) -> Complex:
        if isinstance(other, Tensor):
            return Complex(self.real - other, self.imag)
        return Complex(self.real - other.real, self.imag - other.imag)

    def __mul__(self, other: Tensor | float) -> Complex:
        """By real numbers: the stems multiply nothing else element by element."""
        return self._each(lambda x: x * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Tensor | float) -> Complex:
        return self._each(lambda x: x / other)

    def __matmul__(self, other: Complex) -> Complex:
        return Complex(
            self.real @ other.real - self.imag @ other.imag,
            self.real @ other.imag + self.imag @ other.real,
        )

    def abs(self) -> Tensor:
        return (self.real.square() + self.imag.square()).sqrt()

    def gather(self, dim: int, index: Tensor) -> Complex:
        return self._each(lambda x: x.gather(dim, index))

    def diagonal(self, **dims: int) -> Complex:
        return self._each(lambda x: x.diagonal(**dims))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        served = _FUNCTIONS.get(func)
        return NotImplemented if served is None else served(*args, **(kwargs or {}))


def _vector_norm(x: Complex, *, dim: int, keepdim: bool) -> Tensor:
    return (x.real.square() + x.imag.square()).sum(dim, keepdim=keepdim).sqrt()


@functools.cache
def _transform(n: int, dtype: torch.dtype, sign: int) -> Complex:
    """The orthonormal DFT matrix of n points, its inverse for sign +1."""
    k = torch.arange(n, dtype=torch.float64)
    # whole turns out: the angle stays exact
    angle = sign * 2 * math.pi * (torch.outer(k, k) % n) / n
    return Complex(angle.cos(), angle.sin())._each(lambda x: (x / math.sqrt(n)).to(dtype))


def _fft2(x: Complex, norm: str, sign: int = -1) -> Complex:
    """A product with a constant matrix on either side: ONNX's own DFT has one dimension at a time."""
    if norm != "ortho":
        raise ValueError(f'norm must be "ortho", got {norm!r}')
    M, N = x.shape[-2:]
    return _transform(M, x.dtype, sign) @ x @ _transform(N, x.dtype, sign)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.view_as_real: Complex.pairs,
    torch.fft.fft2: _fft2,
    torch.fft.ifft2: lambda x, norm: _fft2(x, norm, +1),
    torch.linalg.vector_norm: _vector_norm,
    Tensor.expand_as: lambda index, x: index.expand(x.shape),
}


class RealTwin(reference.LoMACSSVDNet):
    """The reference network on `Complex`: `forward(H, sid) -> U, S, V, Hd`, all of them real.

    H real `(B, M, N, 2)`, sid int64 `(B,)`; U `(B, M, r, 2)`, S `(B, r)`, V `(B, N, r, 2)`, Hd like H.
    """

    complex_of: ClassVar[Any] = staticmethod(Complex.of)

    def forward(self, H: Tensor, sid: Tensor | int) -> Any:
        U, S, V, Hd = super().forward(H, sid)
        return U.pairs(), S, V.pairs(), Hd.pairs()  # type: ignore[attr-defined]

    def _complex_input(self, H: Tensor) -> Any:
        return Complex.of(H)


def real_twin(net: reference.LoMACSSVDNet, dtype: torch.dtype = torch.float32) -> RealTwin:
    """The twin of a network, with a copy of its weights: on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin = RealTwin(**net.config)
    try:
        twin.load_state_dict(net.state_dict())
    except RuntimeError as error:
        raise ValueError(f"net must have the state of a network of its config: {error}") from error
    # computed before anything traces, so that a graph holds them as constants
    for n in (net.M, net.N):
        for sign in (-1, 1):
            _transform(n, dtype, sign)
    # tau as well: a scalar of double precision would make its neighbours double in ONNX
    return twin.to(dtype).eval().requires_grad_(False)


# largest relative L2 difference between a network and its twin that is rounding
AGREE = 1e-3


def _compare(net: reference.LoMACSSVDNet, twin: RealTwin) -> None:
    """Raises ValueError where the network is not what its class and its state say."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(2, net.M, net.N, 2, generator=generator) / math.sqrt(2 * net.M * net.N)
    sid = torch.tensor([0, net.n_scene - 1])

    def product(U: Tensor, S: Tensor, V: Tensor, Hd: Tensor) -> list[Tensor]:
        # columns of close singular values may change places between precisions
        return [(U * S.unsqueeze(-2)) @ V.mH, Hd]

    theirs = product(*net(H.to(net.pos), sid.to(net.pos.device)))
    ours = product(*(torch.view_as_complex(x) if x.ndim == 4 else x for x in twin(H, sid)))
    for name, x, y in zip(("U diag(S) V^H", "Hd"), theirs, ours, strict=True):
        x = x.to("cpu", y.dtype)
        far = float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y))
        if not far <= AGREE:
            raise ValueError(
                f"net must compute what its config and state say, its {name} is off by {far:.1e}"
            )


def _stable_sort(width: int) -> Callable[..., Any]:
    """`aten::sort.stable` over so many numbers, which the converter lacks; of equals TopK takes the first."""
    from onnxscript import opset18 as op

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        count: Any = op.Constant(value_ints=[width])
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return sort


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter says of its own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_onnx(
    net: reference.LoMACSSVDNet,
    path: str | os.PathLike[str],
    *,
    batch: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the network as one ONNX file, in real arithmetic and single precision.

    Complex numbers are pairs of real ones in a last dimension of 2. The file's input is `H` float32
    `(B, M, N, 2)` and `sid` int64 `(B,)`, its output `U (B, M, r, 2)`, `S (B, r)`, `V (B, N, r, 2)` and
    `Hd (B, M, N, 2)`: what `net(H, sid)` gives in evaluation mode, at the present `tau_s`, to rounding. As in
    the network, H is taken at the scale that it has. A scene out of range is the runtime's error. It needs
    ONNX operator set 18 and no custom operator; both Fourier transforms are products with constant matrices.

    Args:
        net: a `LoMACSSVDNet`, pruned or not, of this package or its reference; it stays as it is.
        path: the file; it appears whole or not at all.
        batch: samples in a call of the file; None leaves that to every call.
        overwrite: replace a file that is there.

    Raises:
        TypeError: where `net` is no such network or `batch` no integer.
        ValueError: for a batch below 1, a path that names no file, or a network whose parts were replaced by
            others: it is compared with its twin on a random channel first.
        FileExistsError: where the file is there and `overwrite` is false.
        ImportError: where onnx or onnxscript is not installed.
        OSError: where the file cannot be written.
    """
    if not isinstance(net, reference.LoMACSSVDNet):
        raise TypeError(f"net must be a LoMACSSVDNet, got {type(net).__name__}")
    batch = None if batch is None else integer("batch", batch, 1)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX files need onnx and onnxscript: pip install 'lomacs_fast[onnx]'") from error
    with torch.no_grad():
        twin = real_twin(net)
        _compare(net, twin)
    with atomic_path(path, overwrite=overwrite) as temporary:
        # a batch of 1 in the example would be taken for a constant
        example = batch or 2
        inputs = torch.ones(example, net.M, net.N, 2), torch.zeros(example, dtype=torch.int64)
        samples = {0: torch.export.Dim("B", min=1)}
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                twin,
                inputs,
                input_names=["H", "sid"],
                output_names=["U", "S", "V", "Hd"],
                dynamic_shapes=(samples, samples) if batch is None else None,
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort(net.r)},
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(temporary, external_data=False)
