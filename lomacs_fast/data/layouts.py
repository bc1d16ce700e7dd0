"""Channel matrices from the layouts that the field's tools write, read lazily as complex `(n, M, N)`.

Layouts (`n` counts the matrices; a real array carries the real and imaginary part in a last axis of 2):

==========  ============================================================================================
`complex`   complex `(..., M, N)`, leading axes in C order
`real`      float `(..., M, N, 2)`
`sionna`    `(batch, num_rx, num_rx_ant, num_tx, num_tx_ant, num_ofdm_symbols, fft_size)`: one matrix
            `M = num_rx_ant`, `N = num_tx_ant` for every (batch, rx, tx, symbol, subcarrier), the last
            fastest
`deepmimo`  `(n_ue, n_rx, n_tx, n_sub)`: one matrix `M = n_rx`, `N = n_tx` for every (ue, subcarrier), the
            last fastest
`mat`       MATLAB's habit, axes as `size` shows them: `M x N x n` (further axes in MATLAB's order, the
            third fastest)
`hdf5`      a data set of an HDF5 file, decided as `auto` does
`auto`      by file type, dtype and shape; a `ValueError` names the candidates where these do not decide
==========  ============================================================================================

`auto` takes a real array as `real`, a complex one of 7 axes as `sionna`, of 2, 3, 5, 6 or more than 7 axes as
`complex`; a complex one of 4 axes may be `complex` or `deepmimo` and has to be named. In a `.mat` file two
axes are one matrix, three are `M x N x n` or `n x M x N` by the pair of equal neighbours (64 x 64 x n,
n x 64 x 64); with no pair, or two, name `mat` for `M x N x n` or `complex` (`real`) for `n x M x N`; more
axes than three have to be named there, Sionna's seven excepted. The real and imaginary part are not counted
among these axes.
"""

from __future__ import annotations

import abc
import importlib
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lomacs_fast.data.files import as_path, left_behind

__all__ = ["LAYOUTS", "ChannelSource", "open_channels", "to_complex"]

LAYOUTS = ("auto", "complex", "real", "sionna", "deepmimo", "mat", "hdf5")

Array = npt.NDArray[Any]

_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_TORCH_SUFFIXES = (".pt", ".pth")
_SUFFIXES = (".npy", ".npz", *_TORCH_SUFFIXES, ".mat", *_HDF5_SUFFIXES)
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PAIRS = ({"real", "imag"}, {"r", "i"})
_ELEMENTS = "float16, float32, float64, complex64 or complex128 elements"


class _Axes(NamedTuple):
    """What each axis of a stored array is; the last of `samples` runs fastest."""

    samples: tuple[int, ...]
    m: int
    n: int
    iq: int | None

    def reversed(self, ndim: int) -> _Axes:
        """The same axes of the array stored with its axes in reverse order."""
        flip = [ndim - 1 - axis for axis in range(ndim)]
        return _Axes(
            tuple(flip[axis] for axis in self.samples),
            flip[self.m],
            flip[self.n],
            None if self.iq is None else flip[self.iq],
        )

    def matrix(self) -> tuple[int, ...]:
        return (self.m, self.n) if self.iq is None else (self.m, self.n, self.iq)


class _Element(NamedTuple):
    is_complex: bool
    complex_dtype: np.dtype[Any]


def _find_element(dtype: np.dtype[Any]) -> _Element | None:
    """How elements of `dtype` become complex numbers, or None where they cannot."""
    if dtype.names is not None:
        if len(dtype.names) != 2 or set(dtype.names) not in _PAIRS or dtype[0] != dtype[1]:
            return None
        part = _find_element(dtype[0])
        return None if part is None or part.is_complex else _Element(True, part.complex_dtype)
    single, double = np.dtype(np.complex64), np.dtype(np.complex128)
    sizes: dict[tuple[str, int], np.dtype[Any]] = {
        ("c", 8): single,
        ("c", 16): double,
        ("f", 2): single,
        ("f", 4): single,
        ("f", 8): double,
    }
    found = sizes.get((dtype.kind, dtype.itemsize))
    return None if found is None else _Element(dtype.kind == "c", found)


def _element(dtype: np.dtype[Any], where: str) -> _Element:
    found = _find_element(dtype)
    if found is None:
        raise TypeError(f"{where}: expected {_ELEMENTS}, got dtype {dtype}")
    return found


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def _guess(dims: tuple[int, ...], is_complex: bool, where: str, matlab: bool) -> str:
    ndim = len(dims)
    sample_first = "complex" if is_complex else "real"
    if ndim == 2:
        return sample_first
    if matlab and ndim == 3:
        first, last = dims[1] == dims[2], dims[0] == dims[1]
        if first != last:
            return sample_first if first else "mat"
        raise ValueError(
            f"{where}: cannot tell which axis of {' x '.join(map(str, dims))} counts the samples; "
            f"name the layout: layout='mat' (--layout mat) for M x N x n or layout='{sample_first}' "
            f"(--layout {sample_first}) for n x M x N"
        )
    if ndim == 7 and is_complex:
        return "sionna"
    if matlab or (ndim == 4 and is_complex):
        raise ValueError(
            f"{where}: cannot tell the layout of axes {dims}; name it with layout (--layout): "
            f"'{sample_first}' for (..., M, N), 'deepmimo' for (n_ue, n_rx, n_tx, n_sub)"
            + (", 'mat' for M x N x ..." if matlab else "")
        )
    return sample_first


def _find_axes(
    shape: Sequence[int], is_complex: bool, layout: str, where: str, matlab: bool = False
) -> _Axes:
    """Which axis is what in an array of `shape` under `layout`; `matlab` for axes as MATLAB shows them."""
    shape = tuple(int(k) for k in shape)
    iq = None
    dims = shape
    if is_complex:
        if layout == "real":
            raise TypeError(
                f"{where}: layout 'real' expects floats (..., M, N, 2), got complex of shape {shape}"
            )
    else:
        if layout == "complex":
            raise TypeError(
                f"{where}: layout 'complex' expects a complex dtype, got a real one of shape {shape}"
            )
        if len(shape) < 3 or shape[-1] != 2:
            raise ValueError(
                f"{where}: expected complex (..., M, N) or real (..., M, N, 2), got real of shape {shape}"
            )
        iq = len(shape) - 1
        dims = shape[:-1]
    ndim = len(dims)
    if ndim < 2:
        raise ValueError(f"{where}: expected at least the two axes (M, N), got shape {shape}")
    if layout in ("auto", "hdf5"):
        layout = _guess(dims, is_complex, where, matlab)
    if layout == "sionna":
        if ndim != 7:
            raise ValueError(
                f"{where}: layout 'sionna' expects the 7 axes (batch, num_rx, num_rx_ant, num_tx, "
                f"num_tx_ant, num_ofdm_symbols, fft_size), got shape {shape}"
            )
        axes = _Axes((0, 1, 3, 5, 6), 2, 4, iq)
    elif layout == "deepmimo":
        if ndim != 4:
            raise ValueError(
                f"{where}: layout 'deepmimo' expects the 4 axes (n_ue, n_rx, n_tx, n_sub), got shape {shape}"
            )
        axes = _Axes((0, 3), 1, 2, iq)
    elif layout == "mat":
        axes = _Axes(tuple(range(ndim - 1, 1, -1)), 0, 1, iq)
    else:
        axes = _Axes(tuple(range(ndim - 2)), ndim - 2, ndim - 1, iq)
    M, N = shape[axes.m], shape[axes.n]
    if M < 2 or N < 2:
        raise ValueError(
            f"{where}: expected M and N of at least 2, got M={M}, N={N} from shape {shape} ({layout})"
        )
    if 0 in shape:
        raise ValueError(f"{where}: holds no samples (shape {shape})")
    return axes


def _pack(raw: Array, element: _Element) -> Array:
    """Complex `(n, M, N)` or real `(n, M, N, 2)` of any dtype served, as contiguous complex `(n, M, N)`."""
    target = element.complex_dtype
    if raw.dtype.names is not None:
        real, imag = ("real", "imag") if "real" in raw.dtype.names else ("r", "i")
        out = np.empty(raw.shape, dtype=target)
        out.real = raw[real]
        out.imag = raw[imag]
        return out
    if element.is_complex:
        return np.ascontiguousarray(raw, dtype=target)
    part = np.dtype(np.float32 if target.itemsize == 8 else np.float64)
    packed: Array = np.ascontiguousarray(raw, dtype=part).view(target)[..., 0]
    return packed


def _first_nonfinite(x: Tensor) -> tuple[int, str] | None:
    """Position along the first axis of the first sample with NaN or Inf, and which of the two it has."""
    parts = torch.view_as_real(x.resolve_conj()).flatten(1)
    # A sum is finite only if every term is: one fast pass settles the usual case.
    if bool(torch.isfinite(parts.sum())):
        return None
    finite = torch.isfinite(parts).all(dim=1)
    if bool(finite.all()):
        return None
    k = int(torch.nonzero(~finite)[0, 0])
    return k, "NaN" if bool(torch.isnan(parts[k]).any()) else "Inf"


class ChannelSource(abc.ABC):
    """Complex `M x N` matrices in a file, read on demand; opened by `open_channels`.

    Attributes: `path`, `key` (name of the array inside the file, or None), `layout` as asked for, `M`, `N`,
    `dtype` (`torch.complex64`, or `torch.complex128` where the file is double), `stored_shape` and
    `stored_dtype` (NumPy's) as they are in the file. A source can be pickled and used in forked or spawned
    workers: the file travels by name.
    """

    def __init__(
        self,
        path: Path,
        key: str | None,
        layout: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        axes: _Axes,
    ) -> None:
        element = _element(dtype, _where(path, key))
        self.path = path
        self.key = key
        self.layout = layout
        self.M = int(shape[axes.m])
        self.N = int(shape[axes.n])
        self.dtype = torch.complex64 if element.complex_dtype.itemsize == 8 else torch.complex128
        self.stored_shape = tuple(int(k) for k in shape)
        self.stored_dtype = dtype
        self._samples = tuple(int(shape[axis]) for axis in axes.samples)
        self._length = int(np.prod(self._samples, dtype=np.int64))
        self._axes = axes
        self._element = element

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        name = _where(self.path, self.key)
        return f"{type(self).__name__}({name}: {len(self)} x {self.M} x {self.N}, {self.dtype})"

    def __reduce__(self) -> tuple[Callable[..., ChannelSource], tuple[str, str, str | None]]:
        return _reopen, (os.fspath(self.path), self.layout, self.key)

    def read(self, indices: int | slice | Sequence[int] | Array | Tensor) -> Tensor:
        """The samples at `indices` (negative ones count from the end), in that order.

        Returns a new contiguous `(k, M, N)` tensor of `self.dtype`; k is 1 for a single integer.
        Raises `IndexError` for an index outside the source, `TypeError` for indices that are not integers,
        `ValueError` naming the file and the sample for the first sample with NaN or Inf.
        """
        wanted = self._resolve(indices)
        x = torch.from_numpy(_pack(self._gather(wanted), self._element))
        bad = _first_nonfinite(x)
        if bad is not None:
            sample = int(wanted[bad[0]])
            at = ""
            if len(self._samples) > 1:
                at = f" (axes {tuple(int(c) for c in np.unravel_index(sample, self._samples))})"
            raise ValueError(f"{_where(self.path, self.key)}: sample {sample}{at} holds {bad[1]}")
        return x

    def _resolve(self, indices: int | slice | Sequence[int] | Array | Tensor) -> npt.NDArray[np.int64]:
        if isinstance(indices, slice):
            return np.arange(*indices.indices(len(self)), dtype=np.int64)
        if isinstance(indices, Tensor):
            indices = indices.detach().cpu().numpy()
        found = np.atleast_1d(np.asarray(indices))
        if found.size == 0:
            found = found.astype(np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise TypeError(
                f"indices: expected a slice, an integer or a 1-D sequence of integers, got {indices!r}"
            )
        found = found.astype(np.int64)
        outside = (found < -len(self)) | (found >= len(self))
        if outside.any():
            raise IndexError(
                f"{_where(self.path, self.key)}: index {found[outside][0]} is outside its {len(self)} samples"
            )
        return np.where(found < 0, found + len(self), found)

    @abc.abstractmethod
    def _gather(self, wanted: npt.NDArray[np.int64]) -> Array:
        """A copy of the samples: `(k, M, N)`, or `(k, M, N, 2)` where the file is real."""


class _ArraySource(ChannelSource):
    """Samples of an array in memory or on a memory map: only what is asked for is touched."""

    def __init__(self, path: Path, key: str | None, layout: str, array: Array, axes: _Axes) -> None:
        super().__init__(path, key, layout, array.shape, array.dtype, axes)
        self._view = np.asarray(array).transpose(*axes.samples, *axes.matrix())

    def _gather(self, wanted: npt.NDArray[np.int64]) -> Array:
        if not self._samples:
            return np.repeat(self._view[None], wanted.size, axis=0)
        if len(self._samples) == 1 and wanted.size and bool((np.diff(wanted) == 1).all()):
            return np.array(self._view[wanted[0] : wanted[-1] + 1], order="C")
        gathered: Array = self._view[np.unravel_index(wanted, self._samples)]
        return gathered


class _Hdf5Source(ChannelSource):
    """Samples of an HDF5 data set, read as runs of neighbouring samples."""

    def __init__(
        self,
        path: Path,
        key: str,
        layout: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        axes: _Axes,
    ) -> None:
        super().__init__(path, key, layout, shape, dtype, axes)
        self._name = key
        self._handle: Any = None
        self._pid = -1

    def _dataset(self) -> Any:
        # An HDF5 handle must not cross a fork: every process opens its own.
        if self._handle is None or self._pid != os.getpid():
            self._handle = _open_hdf5(self.path)
            self._pid = os.getpid()
        return self._handle[self._name]

    def _gather(self, wanted: npt.NDArray[np.int64]) -> Array:
        dataset = self._dataset()
        matrix = self._axes.matrix()
        sizes = tuple(dataset.shape[axis] for axis in matrix)
        out = np.empty((wanted.size, *sizes), dtype=self.stored_dtype)
        if wanted.size == 0:
            return out
        order = np.argsort(wanted, kind="stable")
        fast = self._samples[-1] if self._samples else 1
        ordered = wanted[order]
        # A run ends where an index is skipped or the slowest axes change.
        breaks = (np.diff(ordered) > 1) | (np.diff(ordered // fast) > 0)
        cuts = np.flatnonzero(breaks) + 1
        for run in np.split(order, cuts):
            first, last = int(wanted[run[0]]), int(wanted[run[-1]])
            selection: list[Any] = [slice(None)] * dataset.ndim
            kept = list(matrix)
            if self._samples:
                coordinates = np.unravel_index(first, self._samples)
                for axis, c in zip(self._axes.samples, coordinates, strict=True):
                    selection[axis] = int(c)
                run_axis = self._axes.samples[-1]
                begin = selection[run_axis]
                selection[run_axis] = slice(begin, begin + last - first + 1)
                kept.insert(0, run_axis)
            try:
                block = dataset[tuple(selection)]
            except OSError as error:
                raise ValueError(f"{_where(self.path, self.key)}: cannot be read ({error})") from error
            rank = np.argsort(np.argsort(kept))
            block = block.transpose(*rank)
            out[run] = block[wanted[run] - first] if self._samples else block
        return out


@dataclass(frozen=True)
class _Entry:
    """An array that a file with several of them offers."""

    shape: tuple[int, ...]
    dtype: str
    usable: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def _where(path: Path, key: str | None) -> str:
    return f"{path}" if key is None else f"{path}[{key}]"


def _usable(shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
    return _find_element(dtype) is not None and sum(int(k) >= 2 for k in shape) >= 2


def _choose_key(path: Path, entries: Mapping[str, _Entry], key: str | None) -> str:
    listing = ", ".join(f"{name} ({entry})" for name, entry in entries.items()) or "none"
    if key is not None:
        if key not in entries:
            raise ValueError(f"{path}: has no array {key!r}; there are: {listing}")
        return key
    usable = [name for name, entry in entries.items() if entry.usable]
    if len(usable) == 1:
        return usable[0]
    if "H" in usable:
        return "H"
    if not usable:
        raise ValueError(f"{path}: expected an array of channel matrices, there are: {listing}")
    raise ValueError(f"{path}: holds several arrays, name one with key (--key); there are: {listing}")


def _need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module.partition('.')[0]}: pip install 'lomacs_fast[data]'"
        ) from error


def _read_npy_header(file: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"format version {version}")
        if any(k < 0 for k in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{where}: expected a .npy array, its header cannot be read ({reason})") from error
    if dtype.hasobject:
        raise TypeError(
            f"{where}: holds pickled Python objects, which are never unpickled; expected {_ELEMENTS}"
        )
    return shape, fortran, dtype


def _map_npy(path: Path, where: str, begin: int, available: int) -> Array:
    """The `.npy` array that starts at byte `begin` of a file and has `available` bytes, memory-mapped."""
    with open(path, "rb") as file:
        file.seek(begin)
        shape, fortran, dtype = _read_npy_header(file, where)
        offset = file.tell()
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if available - (offset - begin) < needed:
        raise ValueError(
            f"{where}: truncated, shape {shape} of {dtype} needs {needed} bytes, "
            f"got {available - (offset - begin)}"
        )
    if needed == 0:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _open_npy(path: Path, key: str | None) -> tuple[Array, str | None]:
    if key is not None:
        raise ValueError(f"{path}: a .npy file has no keys, got key={key!r}")
    return _map_npy(path, str(path), 0, path.stat().st_size), None


def _open_npz(path: Path, key: str | None) -> tuple[Array, str | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            entries = {}
            for name, info in members.items():
                with archive.open(info) as stream:
                    try:
                        shape, _, dtype = _read_npy_header(stream, _where(path, name))  # type: ignore[arg-type]
                    except TypeError:
                        entries[name] = _Entry((), "object", False)
                        continue
                entries[name] = _Entry(shape, str(dtype), _usable(shape, dtype))
            key = _choose_key(path, entries, key)
            info = members[key]
            if info.compress_type != zipfile.ZIP_STORED:
                # A compressed member has no place in the file that could be mapped.
                with archive.open(info) as stream:
                    _read_npy_header(stream, _where(path, key))  # type: ignore[arg-type]
                with archive.open(info) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False), key
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: expected an .npz archive, this one cannot be read ({error})") from error
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    begin = info.header_offset + 30 + int.from_bytes(local[26:28], "little")
    begin += int.from_bytes(local[28:30], "little")
    return _map_npy(path, _where(path, key), begin, info.file_size), key


def _torch_dtype_as_numpy(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy dtype in which tensors of `dtype` are served; `object` where they are not."""
    served: dict[torch.dtype, Any] = {
        torch.float16: np.float16,
        torch.bfloat16: np.float32,
        torch.float32: np.float32,
        torch.float64: np.float64,
        torch.complex32: np.complex64,
        torch.complex64: np.complex64,
        torch.complex128: np.complex128,
    }
    return np.dtype(served.get(dtype, object))


def _check_tensor(x: Tensor, where: str) -> None:
    if _torch_dtype_as_numpy(x.dtype) == np.dtype(object):
        raise TypeError(f"{where}: expected {_ELEMENTS}, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{where}: expected a dense tensor, got {x.layout}")


def _open_torch(path: Path, key: str | None) -> tuple[Array, str | None]:
    try:
        # Files of the older, unzipped form cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: expected a tensor or a dict of tensors ({reason})") from error
    if isinstance(content, Tensor):
        if key is not None:
            raise ValueError(f"{path}: holds one tensor and no keys, got key={key!r}")
        x = content
    elif isinstance(content, Mapping):
        tensors = {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
        entries = {
            name: _Entry(
                tuple(x.shape),
                str(x.dtype).removeprefix("torch."),
                _usable(x.shape, _torch_dtype_as_numpy(x.dtype)),
            )
            for name, x in tensors.items()
        }
        key = _choose_key(path, entries, key)
        x = tensors[key]
    else:
        raise ValueError(f"{path}: expected a tensor or a dict of tensors, got {type(content).__name__}")
    _check_tensor(x, _where(path, key))
    if x.dtype == torch.bfloat16:
        x = x.float()
    elif x.dtype == torch.complex32:
        x = x.to(torch.complex64)
    return x.detach().resolve_conj().resolve_neg().numpy(), key


def _open_mat5(path: Path, key: str | None) -> tuple[Array, str]:
    io = _need("scipy.io", f"{path}: reading a .mat file of version 5")
    try:
        listed = io.whosmat(str(path))
        # MATLAB's class says single or double; whether it is complex is known once it is read.
        numbers = ("double", "single")
        entries = {
            name: _Entry(tuple(shape), kind, kind in numbers and _usable(shape, np.dtype(np.float64)))
            for name, shape, kind in listed
        }
    # SciPy raises whatever the damaged bytes lead to.
    except Exception as error:
        raise ValueError(f"{path}: expected a MATLAB file, this one cannot be read ({error})") from error
    key = _choose_key(path, entries, key)
    if entries[key].dtype not in numbers:
        raise TypeError(f"{_where(path, key)}: expected {_ELEMENTS}, got MATLAB's class {entries[key].dtype}")
    try:
        array = io.loadmat(str(path), variable_names=[key])[key]
    except Exception as error:
        raise ValueError(f"{_where(path, key)}: cannot be read ({error})") from error
    return np.asarray(array), key


def _open_hdf5(path: Path) -> Any:
    h5py = _need("h5py", f"{path}: reading HDF5")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: expected an HDF5 file, this one cannot be read ({error})") from error


def _hdf5_source(path: Path, key: str | None, layout: str, matlab: bool) -> ChannelSource:
    h5py = _need("h5py", f"{path}: reading HDF5")
    entries: dict[str, _Entry] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None and not name.startswith("#"):
            shape = item.shape[::-1] if matlab else item.shape
            entries[name] = _Entry(tuple(shape), str(item.dtype), _usable(shape, item.dtype))

    with _open_hdf5(path) as file:
        file.visititems(visit)
        chosen = _choose_key(path, entries, None if key is None else key.strip("/"))
        dataset = file[chosen]
        shape, dtype = tuple(dataset.shape), dataset.dtype
    where = _where(path, chosen)
    element = _element(dtype, where)
    axes = _find_axes(entries[chosen].shape, element.is_complex, layout, where, matlab)
    if matlab:
        axes = axes.reversed(len(shape))
    return _Hdf5Source(path, chosen, layout, shape, dtype, axes)


def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        # The superblock follows a user block of 0, 512, 1024, ... bytes; MATLAB's has 512.
        for offset in (0, 512, 1024, 2048):
            file.seek(offset)
            if file.read(8) == _HDF5_SIGNATURE:
                return True
    return False


def _reopen(path: str, layout: str, key: str | None) -> ChannelSource:
    return open_channels(path, layout, key=key)


def open_channels(
    path: str | os.PathLike[str], layout: str = "auto", *, key: str | None = None
) -> ChannelSource:
    """Open a file of channel matrices without reading it.

    `.npy`, uncompressed `.npz` and `.pt`/`.pth` (zip form, a tensor or a dict of tensors) are memory-mapped,
    HDF5 (`.h5`, `.hdf5`, `.hdf`, `.mat` of version 7.3) is read in slices; a `.mat` of version 5 or before
    and a compressed `.npz` are read whole. Nothing is unpickled. `layout` is one of `LAYOUTS` (see the
    module); `key` names the array in a file that can hold several: without it the only array that can be
    channels is taken, or the one called `H`. Complex numbers may also be compounds of (real, imag) or (r, i).

    Single and half precision are served as complex64, double precision as complex128.

    Raises `FileNotFoundError` for a missing file, `TypeError` for elements that are not floats or complex
    (or contradict `layout`), `ImportError` where SciPy or h5py is needed and absent, `ValueError` for
    everything else that is wrong: empty, truncated or damaged files, unknown suffixes, layouts and keys
    (those there are get listed), shapes that do not fit the layout, M or N below 2, no samples, an `auto`
    that cannot decide. Every message begins with the file.
    """
    _check_layout(layout)
    path = as_path(path, "a file of channels")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file{left_behind(path)}")
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of channels, got a folder")
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(_SUFFIXES)}, got {suffix or 'no suffix'}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected an array of channels, the file is empty")
    if layout == "mat" and suffix != ".mat":
        raise ValueError(f"{path}: layout 'mat' expects a .mat file, got {suffix}")
    if layout == "hdf5" and suffix not in (*_HDF5_SUFFIXES, ".mat"):
        raise ValueError(f"{path}: layout 'hdf5' expects one of {', '.join(_HDF5_SUFFIXES)}, got {suffix}")
    matlab = suffix == ".mat"
    if suffix in _HDF5_SUFFIXES or (matlab and _is_hdf5(path)):
        return _hdf5_source(path, key, layout, matlab)
    array: Array
    chosen: str | None
    if matlab:
        if layout == "hdf5":
            raise ValueError(
                f"{path}: layout 'hdf5' expects an HDF5 file, this .mat file is of an older version"
            )
        array, chosen = _open_mat5(path, key)
    elif suffix == ".npy":
        array, chosen = _open_npy(path, key)
    elif suffix == ".npz":
        array, chosen = _open_npz(path, key)
    else:
        array, chosen = _open_torch(path, key)
    where = _where(path, chosen)
    element = _element(array.dtype, where)
    axes = _find_axes(array.shape, element.is_complex, layout, where, matlab)
    return _ArraySource(path, chosen, layout, array, axes)


def to_complex(
    array: Array | Tensor, layout: str = "auto", *, name: str = "H", check_finite: bool = True
) -> Tensor:
    """An array or tensor in memory as contiguous complex `(n, M, N)`, in the sample order of the layout.

    Takes complex `(..., M, N)`, real `(..., M, N, 2)`, Sionna's seven axes and DeepMIMO's four; `auto`
    decides as it does for files, and `mat` takes `M x N x n`. The result is complex64, or complex128 for
    double precision, on the device of the input, differentiable, and may share memory with it.

    Raises `TypeError` for something else than an array or tensor of floats or complex numbers, `ValueError`
    for a shape that does not fit and, with `check_finite`, for NaN or Inf, naming the sample. `name` is what
    the messages call the array.
    """
    _check_layout(layout)
    if layout == "hdf5":
        raise ValueError(f"{name}: layout 'hdf5' is for files, not for arrays in memory")
    if isinstance(array, Tensor):
        x = array
    elif isinstance(array, np.ndarray):
        x = _to_tensor(array, name)
    else:
        raise TypeError(f"{name}: expected a tensor or a NumPy array, got {type(array).__name__}")
    _check_tensor(x, name)
    if x.dtype == torch.complex32:
        x = x.to(torch.complex64)
    elif x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    axes = _find_axes(x.shape, x.is_complex(), layout, name)
    x = x.permute(*axes.samples, *axes.matrix())
    x = x.reshape(-1, *x.shape[len(axes.samples) :]).resolve_conj().resolve_neg().contiguous()
    if not x.is_complex():
        x = torch.view_as_complex(x)
    bad = _first_nonfinite(x.detach()) if check_finite else None
    if bad is not None:
        raise ValueError(f"{name}: sample {bad[0]} holds {bad[1]}")
    return x


def _to_tensor(array: Array, name: str) -> Tensor:
    element = _element(array.dtype, name)
    native: np.dtype[Any] = element.complex_dtype
    if array.dtype.names is not None:
        return torch.from_numpy(_pack(array, element))
    if not element.is_complex:
        native = np.dtype(np.float32 if native.itemsize == 8 else np.float64)
    # torch takes neither foreign byte order, negative strides nor read-only memory.
    plain = np.ascontiguousarray(array, dtype=native)
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())
