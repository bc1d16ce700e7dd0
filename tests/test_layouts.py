"""Every layout read back against direct indexing, lazily; every bad file refused by one clear sentence."""

import copy
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from lomacs_fast.data import layouts
from lomacs_fast.data.layouts import open_channels, to_complex

COMPLEX = [np.complex64, np.complex128]
FLOATS = [np.float16, np.float32, np.float64]
PAIR = {np.complex64: np.float32, np.complex128: np.float64}


def random_complex(*shape, dtype=np.complex64, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)


def as_real(x):
    return np.stack([x.real, x.imag], axis=-1)


def compound(x, names=("real", "imag")):
    part = x.real.dtype
    out = np.empty(x.shape, dtype=[(names[0], part), (names[1], part)])
    for name in names:
        out[name] = x.real if name in ("real", "r") else x.imag
    return out


def write_mat73(path, **arrays):
    """A version 7.3 file as MATLAB lays it out: user block, reversed axes, compounds, class attributes."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, x in arrays.items():
            stored = compound(x) if np.iscomplexobj(x) else x
            dataset = file.create_dataset(name, data=stored.transpose())
            dataset.attrs["MATLAB_class"] = np.bytes_("single" if x.real.dtype == np.float32 else "double")
        file.create_group("#refs#").create_dataset("a", data=np.zeros((3, 3)))
    text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024 HDF5 schema 1.00 ."
    with open(path, "r+b") as file:
        file.write(text.ljust(116, b" ") + bytes(8) + b"\x00\x02IM")


def check(source, expected):
    """All samples, slices, repeats and single ones equal `expected` (n, M, N) bit for bit."""
    n, M, N = expected.shape
    assert (len(source), source.M, source.N) == (n, M, N)
    expected = torch.from_numpy(np.ascontiguousarray(expected))
    assert source.dtype == expected.dtype

    def same(indices, wanted):
        got = source.read(indices)
        assert got.is_contiguous()
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)

    same(slice(None), expected)
    same(slice(1, n, 2), expected[1::2])
    same(slice(None, None, -1), expected.flip(0))
    shuffled = np.random.default_rng(1).integers(-n, n, size=2 * n)
    same(shuffled, expected[torch.from_numpy(shuffled)])
    same(shuffled.tolist(), expected[torch.from_numpy(shuffled)])
    same(torch.from_numpy(shuffled), expected[torch.from_numpy(shuffled)])
    same(n - 1, expected[-1:])
    same(range(0), expected[:0])


@pytest.fixture(params=[".npy", ".npz", ".pt", ".h5"])
def save(request, tmp_path):
    """Writes one array in a file of each kind and gives its path."""

    def write(x, name="channels"):
        path = tmp_path / f"{name}{request.param}"
        if request.param == ".npy":
            np.save(path, x)
        elif request.param == ".npz":
            np.savez(path, H=x, C=np.float64(3.24))
        elif request.param == ".pt":
            torch.save(torch.from_numpy(x), path)
        else:
            with h5py.File(path, "w") as file:
                file["group/H"] = x
        return path

    return write


# Layouts


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 3, 2, 3, 5), (1, 2, 2)])
def test_complex(save, dtype, shape):
    x = random_complex(*shape, dtype=dtype)
    check(open_channels(save(x)), x.reshape(-1, *shape[-2:]))
    check(open_channels(save(x), "complex"), x.reshape(-1, *shape[-2:]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 3, 3, 5), (2, 3, 4, 4, 2)])
def test_real(save, dtype, shape):
    pair = as_real(random_complex(*shape)).astype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = pair[..., 0].astype(wide) + 1j * pair[..., 1].astype(wide)
    check(open_channels(save(pair)), expected.reshape(-1, *shape[-2:]))
    check(open_channels(save(pair), "real"), expected.reshape(-1, *shape[-2:]))


def test_single_matrix(save):
    x = random_complex(4, 3)
    check(open_channels(save(x)), x[None])
    check(open_channels(save(as_real(x), "pair")), x[None])


def sionna_by_index(x):
    b, rx, _, tx, _, symbols, carriers = x.shape
    return np.stack(
        [
            x[i, j, :, k, :, s, c]
            for i in range(b)
            for j in range(rx)
            for k in range(tx)
            for s in range(symbols)
            for c in range(carriers)
        ]
    )


def test_sionna_layout(save):
    x = random_complex(2, 3, 4, 2, 5, 3, 6)
    check(open_channels(save(x)), sionna_by_index(x))
    check(open_channels(save(as_real(x), "pair"), "sionna"), sionna_by_index(x))


def test_deepmimo_layout(save):
    x = random_complex(3, 4, 2, 5)
    expected = np.stack([x[u, :, :, c] for u in range(3) for c in range(5)])
    check(open_channels(save(x), "deepmimo"), expected)
    check(open_channels(save(as_real(x), "pair"), "deepmimo"), expected)


def test_sionna_own_output(tmp_path):
    """A UMi uplink of TR 38.901, as Sionna returns it: several transmitters, symbols and subcarriers."""
    phy = pytest.importorskip("sionna.phy")
    from sionna.phy.channel import GenerateOFDMChannel, gen_single_sector_topology, tr38901
    from sionna.phy.ofdm import ResourceGrid

    phy.config.seed = 1
    array = {"polarization": "dual", "polarization_type": "cross", "carrier_frequency": 3.5e9}
    base = tr38901.PanelArray(num_rows_per_panel=2, num_cols_per_panel=2, antenna_pattern="38.901", **array)
    user = tr38901.PanelArray(num_rows_per_panel=1, num_cols_per_panel=1, antenna_pattern="omni", **array)
    model = tr38901.UMi(
        carrier_frequency=3.5e9, o2i_model="low", ut_array=user, bs_array=base, direction="uplink"
    )
    model.set_topology(*gen_single_sector_topology(3, 2, "umi", min_ut_velocity=10, max_ut_velocity=20))
    grid = ResourceGrid(num_ofdm_symbols=3, fft_size=12, subcarrier_spacing=30e3, num_tx=2)
    h = GenerateOFDMChannel(model, grid, normalize_channel=True)(3)
    assert h.shape == (3, 1, 8, 2, 2, 3, 12)

    expected = torch.from_numpy(sionna_by_index(h.numpy()))
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(to_complex(h), expected)
    assert torch.equal(to_complex(h.numpy(), "sionna"), expected)
    np.save(tmp_path / "h.npy", h.numpy())
    check(open_channels(tmp_path / "h.npy"), expected.numpy())
    torch.save({"h_freq": h}, tmp_path / "h.pt")
    check(open_channels(tmp_path / "h.pt", "sionna"), expected.numpy())


@pytest.mark.parametrize("chunks", [None, (2, 2, 2)])
@pytest.mark.parametrize("names", [("real", "imag"), ("r", "i"), ("imag", "real"), ("i", "r")])
def test_hdf5_compounds_and_chunks(tmp_path, chunks, names):
    x = random_complex(9, 4, 3)
    with h5py.File(tmp_path / "h.hdf5", "w") as file:
        file.create_dataset("H", data=compound(x, names), chunks=chunks)
    check(open_channels(tmp_path / "h.hdf5"), x)
    check(open_channels(tmp_path / "h.hdf5", "hdf5", key="/H"), x)


@pytest.mark.parametrize("dtype", [">c8", ">f4", "<f2"])
def test_foreign_byte_order(tmp_path, dtype):
    x = random_complex(5, 4, 3)
    stored = x.astype(dtype) if "c" in dtype else as_real(x).astype(dtype)
    np.save(tmp_path / "h.npy", stored)
    wide = stored.astype(dtype[1:].replace("f2", "f4"))
    check(open_channels(tmp_path / "h.npy"), wide if "c" in dtype else wide[..., 0] + 1j * wide[..., 1])


def test_fortran_order(tmp_path):
    x = random_complex(5, 4, 3)
    np.save(tmp_path / "h.npy", np.asfortranarray(x))
    assert b"'fortran_order': True" in (tmp_path / "h.npy").read_bytes()[:128]
    check(open_channels(tmp_path / "h.npy"), x)


def test_npz_compressed(tmp_path):
    x = random_complex(5, 4, 3)
    np.savez_compressed(tmp_path / "h.npz", a=x, b=np.arange(3))
    check(open_channels(tmp_path / "h.npz"), x)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    x = random_complex(5, 4, 3)
    content = {"H": torch.from_numpy(x), "labels": torch.arange(5), "other": torch.from_numpy(x)}
    torch.save(content, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
    check(open_channels(tmp_path / "h.pt"), x)
    check(open_channels(tmp_path / "h.pt", key="other"), x)
    lazy = torch.from_numpy(x).mH.conj()
    torch.save(lazy, tmp_path / "lazy.pt", _use_new_zipfile_serialization=zipped)
    check(open_channels(tmp_path / "lazy.pt"), x.transpose(0, 2, 1))


def test_torch_bfloat16(tmp_path):
    x = torch.from_numpy(as_real(random_complex(5, 4, 3))).bfloat16()
    torch.save(x, tmp_path / "h.pt")
    check(open_channels(tmp_path / "h.pt"), torch.view_as_complex(x.float()).numpy())


# MATLAB

MAT_WRITERS = {
    "5": lambda path, **arrays: scipy.io.savemat(path, arrays),
    "5z": lambda path, **arrays: scipy.io.savemat(path, arrays, do_compression=True),
    "4": lambda path, **arrays: scipy.io.savemat(path, arrays, format="4"),
    "7.3": write_mat73,
}


@pytest.fixture(params=["5", "5z", "7.3"])
def write_mat(request, tmp_path):
    def write(name="h", **arrays):
        path = tmp_path / f"{name}.mat"
        MAT_WRITERS[request.param](path, **arrays)
        return path

    return write


@pytest.mark.parametrize("dtype", COMPLEX)
def test_mat_samples_last(write_mat, dtype):
    x = random_complex(4, 4, 6, dtype=dtype)
    expected = np.stack([x[:, :, k] for k in range(6)])
    path = write_mat(H=x, fc=np.array([[3.5e9]]))
    check(open_channels(path), expected)
    check(open_channels(path, "mat"), expected)


def test_mat_samples_first(write_mat):
    x = random_complex(6, 4, 4)
    check(open_channels(write_mat(H=x)), x)
    rectangular = random_complex(6, 4, 3)
    check(open_channels(write_mat("r", H=rectangular), "complex"), rectangular)


def test_mat_rectangular_samples_last(write_mat):
    x = random_complex(5, 3, 6)
    check(open_channels(write_mat(H=x), "mat"), x.transpose(2, 0, 1))


def test_mat_real_pairs(write_mat):
    x = random_complex(4, 4, 6)
    check(open_channels(write_mat(H=as_real(x))), x.transpose(2, 0, 1))
    first = random_complex(6, 4, 3)
    check(open_channels(write_mat("first", H=as_real(first)), "real"), first)


def test_mat_further_axes_run_in_matlab_order(write_mat):
    x = random_complex(3, 4, 2, 5)
    linear = x.reshape(3, 4, -1, order="F")
    check(open_channels(write_mat(H=x), "mat"), linear.transpose(2, 0, 1))


def test_mat_tool_layouts(write_mat):
    deepmimo, sionna = random_complex(3, 4, 2, 5), random_complex(2, 2, 4, 3, 2, 2, 3)
    expected = np.stack([deepmimo[u, :, :, c] for u in range(3) for c in range(5)])
    check(open_channels(write_mat(H=deepmimo), "deepmimo"), expected)
    check(open_channels(write_mat("sionna", H=sionna)), sionna_by_index(sionna))


def test_mat_one_matrix(write_mat):
    x = random_complex(4, 3)
    check(open_channels(write_mat(anything=x)), x[None])


def test_mat_version_4(tmp_path):
    x = random_complex(4, 3, dtype=np.complex128)
    MAT_WRITERS["4"](tmp_path / "h.mat", H=x)
    check(open_channels(tmp_path / "h.mat"), x[None])


def ambiguous(layout):
    """The way out, in Python and on the command line."""
    return re.escape(
        "name the layout: layout='mat' (--layout mat) for M x N x n or "
        f"layout='{layout}' (--layout {layout}) for n x M x N"
    )


@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 4, 4)])
def test_mat_ambiguous(write_mat, shape):
    path = write_mat(H=random_complex(*shape))
    with pytest.raises(ValueError, match=ambiguous("complex")):
        open_channels(path)
    pair = write_mat("pair", H=as_real(random_complex(*shape)))
    with pytest.raises(ValueError, match=ambiguous("real")):
        open_channels(pair)


def test_mat_refused(write_mat, tmp_path):
    many = write_mat("many", A=random_complex(4, 4, 6), B=random_complex(4, 4, 6))
    with pytest.raises(
        ValueError, match=r"many\.mat: holds several arrays, name one with key \(--key\); .*A .*B "
    ):
        open_channels(many)
    check(open_channels(many, key="B"), random_complex(4, 4, 6).transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"has no array 'H'; there are: A .*B "):
        open_channels(many, key="H")
    with pytest.raises(
        ValueError, match=r"cannot tell the layout of axes .*; name it with layout \(--layout\)"
    ):
        open_channels(write_mat("four", H=random_complex(4, 4, 3, 2)))
    integers = write_mat("integers", H=np.ones((4, 4, 2), np.int16))
    with pytest.raises(ValueError, match=r"expected an array of channel matrices, there are: H \(int16"):
        open_channels(integers)
    with pytest.raises(TypeError, match=r"integers\.mat\[H\]: expected float16.*int16"):
        open_channels(integers, key="H")
    damaged = tmp_path / "damaged.mat"
    damaged.write_bytes(many.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"damaged\.mat.*cannot be read"):
        open_channels(damaged, key="A")


# Laziness


def sparse_npy(path, shape, dtype, start):
    """A `.npy` of zeros that takes no space on disk, with 1, 2, 3, ... in the 32 numbers from `start` on."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).reshape(-1)[start : start + 32] = (
        np.arange(1, 33)
    )


READ_ONE = """
    import resource, sys, torch
    from lomacs_fast.data.layouts import open_channels
    torch.set_num_threads(1)

    def peak():
        # Not getrusage: its peak outlives the fork and exec that made this process.
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

    before = peak()
    limit = 2**31
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    source = open_channels(sys.argv[1], key=sys.argv[3] or None)
    x = source.read([int(sys.argv[2])])
    grown = peak() - before
    assert grown < 64 * 1024, f"{grown} KiB"
    assert not {"scipy", "h5py"} & set(sys.modules)
    print(len(source), x.abs().sum().item())
"""


def read_one(path, index, key=""):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READ_ONE), str(path), str(index), key],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    n, total = done.stdout.split()
    return int(n), float(total)


def test_four_gigabytes_are_not_read(tmp_path):
    """One sample costs a few pages, of a plain file and of a multi-axis one."""
    n, index = 131072, 100_003
    sparse_npy(tmp_path / "plain.npy", (n, 64, 64), np.complex64, index * 64 * 64)
    assert (tmp_path / "plain.npy").stat().st_size > 4 * 10**9
    assert read_one(tmp_path / "plain.npy", index) == (n, 528.0)

    shape = (256, 1, 16, 1, 16, 14, 600)
    start = np.ravel_multi_index((60, 0, 1, 0, 2, 3, 4), shape)
    sparse_npy(tmp_path / "sionna.npy", shape, np.complex64, int(start))
    assert (tmp_path / "sionna.npy").stat().st_size > 4 * 10**9
    sample = np.ravel_multi_index((60, 3, 4), (256, 14, 600))
    assert read_one(tmp_path / "sionna.npy", sample) == (256 * 14 * 600, 1.0)


def test_npz_and_torch_are_mapped(tmp_path):
    x = np.zeros((20_000, 32, 32), np.complex64)
    x[777, 0, 0] = 5
    np.savez(tmp_path / "h.npz", H=x)
    torch.save({"H": torch.from_numpy(x)}, tmp_path / "h.pt")
    assert x.nbytes > 150 * 2**20
    for name in ("h.npz", "h.pt"):
        assert read_one(tmp_path / name, 777, "H") == (20_000, 5.0)


@pytest.mark.parametrize("mat", [False, True])
def test_hdf5_is_read_in_slices(tmp_path, mat, monkeypatch):
    x = random_complex(4, 4, 50)
    path = tmp_path / ("h.mat" if mat else "h.h5")
    if mat:
        write_mat73(path, H=x)
    else:
        with h5py.File(path, "w") as file:
            file["H"] = x.transpose(2, 0, 1)
    source = open_channels(path)
    read = []
    original = h5py.Dataset.__getitem__

    def spy(self, selection, *rest):
        block = original(self, selection, *rest)
        read.append(block.shape[0])
        return block

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    got = source.read([41, 3, 40, 2, 3, 49])
    assert sorted(read) == [1, 2, 2]
    assert np.array_equal(got.numpy(), x.transpose(2, 0, 1)[[41, 3, 40, 2, 3, 49]])


def read_in_worker(source, queue):
    queue.put((source.read([1, 0]).numpy(), getattr(source, "_pid", None)))


def check_in_worker(source, x, method):
    source.read(0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=read_in_worker, args=(source, queue))
    worker.start()
    got, opened_by = queue.get(timeout=60)
    worker.join(60)
    assert worker.exitcode == 0
    assert opened_by in (None, worker.pid), "an HDF5 handle crossed the fork"
    assert np.array_equal(got, x[[1, 0]])


def test_forked_worker(save):
    x = random_complex(6, 4, 3)
    check_in_worker(open_channels(save(x)), x, "fork")


def test_spawned_worker(tmp_path):
    x = random_complex(6, 4, 3)
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["H"] = x
    check_in_worker(open_channels(tmp_path / "h.h5"), x, "spawn")


def test_pickled_source_travels_by_name(save):
    x = random_complex(300, 16, 16)
    source = open_channels(save(x))
    assert len(pickle.dumps(source)) < 1000
    check(copy.copy(source), x)


def test_reading_gives_a_copy(save):
    x = random_complex(3, 2, 2)
    source = open_channels(save(x))
    for indices in (slice(None), [2, 0], 1):
        source.read(indices).zero_()
    check(source, x)
    check(open_channels(source.path), x)


# Bad input


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1j * np.nan])
def test_not_finite_names_file_and_sample(save, bad):
    x = random_complex(6, 4, 3)
    x[3, 2, 1] = bad
    path = save(x)
    source = open_channels(path)
    source.read([0, 1, 2, 4, 5])
    kind = "Inf" if np.isinf(bad) else "NaN"
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*: sample 3 holds {kind}"):
        source.read([5, 3])
    with pytest.raises(ValueError, match=rf"H: sample 3 holds {kind}"):
        to_complex(x)
    assert to_complex(x, check_finite=False).shape == (6, 4, 3)


def test_large_values_are_finite(save):
    x = np.full((6, 4, 3), 3e38 + 3e38j, dtype=np.complex64)
    check(open_channels(save(x)), x)


def test_not_finite_names_the_axes(save):
    x = random_complex(3, 4, 2, 5)
    x[2, 1, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"sample 13 \(axes \(2, 3\)\) holds NaN"):
        open_channels(save(x), "deepmimo").read(slice(None))


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "error", "sentence"),
    [
        ((5, 4, 3), np.int32, "auto", TypeError, "expected float16.*got.*int32"),
        (
            (5, 4, 3),
            np.float32,
            "auto",
            ValueError,
            r"real \(\.\.\., M, N, 2\), got real of shape \(5, 4, 3\)",
        ),
        ((5, 4, 3), np.float32, "real", ValueError, r"real \(\.\.\., M, N, 2\), got real of shape"),
        ((5, 4, 2), np.complex64, "real", TypeError, r"'real' expects floats .*got complex"),
        ((5, 4, 4, 2), np.float32, "complex", TypeError, r"'complex' expects a complex dtype"),
        ((5,), np.complex64, "auto", ValueError, r"at least the two axes \(M, N\), got shape \(5,\)"),
        ((5, 2), np.float32, "auto", ValueError, r"got real of shape \(5, 2\)"),
        ((5, 1, 4), np.complex64, "auto", ValueError, r"at least 2, got M=1, N=4"),
        ((5, 4, 1), np.complex64, "auto", ValueError, r"at least 2, got M=4, N=1"),
        ((5, 4, 1, 2), np.float32, "auto", ValueError, r"at least 2, got M=4, N=1"),
        ((0, 4, 4), np.complex64, "auto", ValueError, r"holds no samples"),
        ((3, 4, 2, 5), np.complex64, "auto", ValueError, r"cannot tell the layout.*'complex'.*'deepmimo'"),
        ((3, 4, 2), np.complex64, "deepmimo", ValueError, r"4 axes \(n_ue, n_rx, n_tx, n_sub\), got shape"),
        ((3, 4, 2, 5), np.complex64, "sionna", ValueError, r"7 axes \(batch, num_rx, .*got shape"),
    ],
)
def test_shapes_and_dtypes_refused(save, shape, dtype, layout, error, sentence):
    x = np.ones(shape, dtype)
    path = save(x)
    key = None if path.suffix in (".npy", ".pt") else "group/H" if path.suffix == ".h5" else "H"
    with pytest.raises(error, match=sentence) as caught:
        open_channels(path, layout, key=key)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=sentence):
        to_complex(torch.from_numpy(x), layout)
    with pytest.raises(error, match=sentence):
        to_complex(x, layout)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".mat", ".h5"])
def test_missing_empty_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"h{suffix}"
    with pytest.raises(FileNotFoundError, match=r"h\.\w+: no such file"):
        open_channels(path)
    path.touch()
    with pytest.raises(ValueError, match=r"h\.\w+: .*the file is empty"):
        open_channels(path)
    path.write_bytes(b"certainly not an array of channels, whatever its name says " * 20)
    with pytest.raises(ValueError, match=r"h\.\w+: expected .*") as caught:
        open_channels(path)
    assert "\n" not in str(caught.value)


def test_truncated(save):
    path = save(random_complex(50, 8, 8))
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 60, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            open_channels(path).read(slice(None))
        assert "\n" not in str(caught.value)
    np.save(path.with_suffix(".npy"), random_complex(50, 8, 8))
    with open(path.with_suffix(".npy"), "r+b") as file:
        file.truncate(25_000)
    with pytest.raises(
        ValueError, match=r"truncated, shape \(50, 8, 8\) of complex64 needs 25600 bytes, got 24872"
    ):
        open_channels(path.with_suffix(".npy"))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "h.npy", np.array([Bomb(), 1], dtype=object), allow_pickle=True)
    with pytest.raises(TypeError, match=r"h\.npy: holds pickled Python objects"):
        open_channels(tmp_path / "h.npy")
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"raw\.npy: expected a \.npy array"):
        open_channels(tmp_path / "raw.npy")
    np.savez(tmp_path / "h.npz", H=np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(TypeError, match=r"holds pickled Python objects"):
        open_channels(tmp_path / "h.npz", key="H")
    torch.save({"H": Bomb()}, tmp_path / "h.pt")
    with pytest.raises(ValueError, match=r"h\.pt: expected a tensor or a dict of tensors") as caught:
        open_channels(tmp_path / "h.pt")
    assert "\n" not in str(caught.value)


def test_keys(tmp_path):
    x = random_complex(5, 4, 3)
    np.savez(tmp_path / "two.npz", A=x, B=x)
    with pytest.raises(ValueError, match=r"two\.npz: holds several arrays.*A \(complex64 \(5, 4, 3\)\), B "):
        open_channels(tmp_path / "two.npz")
    np.save(tmp_path / "one.npy", x)
    with pytest.raises(ValueError, match=r"has no keys, got key='H'"):
        open_channels(tmp_path / "one.npy", key="H")
    torch.save(torch.from_numpy(x), tmp_path / "one.pt")
    with pytest.raises(ValueError, match=r"no keys, got key='H'"):
        open_channels(tmp_path / "one.pt", key="H")
    torch.save([torch.from_numpy(x)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"dict of tensors, got list"):
        open_channels(tmp_path / "list.pt")
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["a/H"], file["b"] = x, "text"
    with pytest.raises(ValueError, match=r"has no array 'c'; there are: a/H \(complex64 \(5, 4, 3\)\), b "):
        open_channels(tmp_path / "h.h5", key="c")
    check(open_channels(tmp_path / "h.h5"), x)


def test_wrong_names(tmp_path):
    (tmp_path / "h.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"h\.csv: expected a file ending in \.npy, .*got \.csv"):
        open_channels(tmp_path / "h.csv")
    with pytest.raises(ValueError, match="path: expected a file of channels, got an empty path"):
        open_channels("")
    with pytest.raises(ValueError, match="got a folder"):
        open_channels(tmp_path)
    np.save(tmp_path / "h.npy", random_complex(5, 4, 3))
    with pytest.raises(ValueError, match=r"layout: expected one of auto, .*got 'matlab'"):
        open_channels(tmp_path / "h.npy", "matlab")
    for layout in ("mat", "hdf5"):
        with pytest.raises(ValueError, match=rf"layout '{layout}' expects"):
            open_channels(tmp_path / "h.npy", layout)


def test_indices_refused(save):
    source = open_channels(save(random_complex(5, 4, 3)))
    for outside in (5, -6, [0, 7], torch.tensor([5])):
        with pytest.raises(IndexError, match=r"is outside its 5 samples"):
            source.read(outside)
    for wrong in (1.0, [0.5], True, [True, False], [[0, 1]], "0"):
        with pytest.raises(TypeError, match="indices: expected"):
            source.read(wrong)


def test_structured_arrays_refused(tmp_path):
    np.save(tmp_path / "h.npy", np.zeros((3, 2, 2), dtype=[("real", "f4"), ("imag", "i4")]))
    with pytest.raises(TypeError, match=r"expected float16"):
        open_channels(tmp_path / "h.npy")


@pytest.mark.parametrize(("module", "suffix"), [("scipy.io", "5"), ("h5py", "7.3")])
def test_missing_dependency(tmp_path, monkeypatch, module, suffix):
    MAT_WRITERS[suffix](tmp_path / "h.mat", H=random_complex(4, 4, 3))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'lomacs_fast\[data\]'"):
        open_channels(tmp_path / "h.mat")


def test_zip_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "h.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(ValueError, match=r"expected an array of channel matrices, there are: none"):
        open_channels(tmp_path / "h.npz")


# In memory


@pytest.mark.parametrize("dtype", COMPLEX)
def test_to_complex(dtype):
    x = random_complex(2, 3, 4, 5, dtype=dtype)
    flat = torch.from_numpy(x.reshape(6, 4, 5))
    pair = as_real(x)
    assert torch.equal(to_complex(x, "complex"), flat)
    assert torch.equal(to_complex(torch.from_numpy(x), "complex"), flat)
    assert torch.equal(to_complex(pair), flat)
    assert torch.equal(to_complex(torch.from_numpy(pair)), flat)
    assert torch.equal(to_complex(compound(x), "complex"), flat)
    assert torch.equal(
        to_complex(np.asfortranarray(x)[::-1], "complex"), flat.view(2, 3, 4, 5).flip(0).flatten(0, 1)
    )
    assert torch.equal(to_complex(x.astype(x.dtype.newbyteorder(">")), "complex"), flat)
    assert torch.equal(to_complex(flat.mH), flat.mH.resolve_conj())
    assert to_complex(flat.mH).is_contiguous()
    assert torch.equal(
        to_complex(x, "mat"), torch.from_numpy(x.reshape(2, 3, -1, order="F")).permute(2, 0, 1)
    )


def test_to_complex_half_and_read_only():
    x = as_real(random_complex(3, 2, 2)).astype(np.float16)
    expected = torch.view_as_complex(torch.from_numpy(x).float())
    assert torch.equal(to_complex(x), expected)
    assert torch.equal(to_complex(torch.from_numpy(x)), expected)
    assert torch.equal(
        to_complex(torch.from_numpy(x).bfloat16()).real, torch.from_numpy(x).bfloat16().float()[..., 0]
    )
    frozen = random_complex(3, 2, 2)
    frozen.flags.writeable = False
    to_complex(frozen).zero_()
    assert frozen.any()


def test_to_complex_is_differentiable():
    x = torch.randn(2, 3, 2, 5, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_complex(x, "deepmimo").abs().square(), x)


def test_to_complex_refuses():
    for wrong in ([[1.0, 2.0]], None, "H"):
        with pytest.raises(TypeError, match="channel: expected a tensor or a NumPy array"):
            to_complex(wrong, name="channel")
    with pytest.raises(TypeError, match="channel: expected a dense tensor"):
        to_complex(torch.eye(3, dtype=torch.complex64).to_sparse(), name="channel")
    with pytest.raises(ValueError, match="'hdf5' is for files"):
        to_complex(torch.ones(2, 2, dtype=torch.complex64), "hdf5")


def test_layout_names_are_all_documented():
    assert layouts.__doc__ is not None
    for layout in layouts.LAYOUTS:
        assert f"`{layout}`" in layouts.__doc__
