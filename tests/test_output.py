"""Predictions in their three forms, and files that appear whole or not at all."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lomacs_fast.data.files import (
    NpyWriter,
    atomic_path,
    left_behind,
    refuse_existing,
    remove_stale,
    replace_group,
    temporary_beside,
)
from lomacs_fast.data.layouts import open_channels
from lomacs_fast.data.output import PredictionWriter, load_predictions

n, M, N, R = 7, 6, 5, 3
FORMS = [".npz", ".npy", ".pt"]


def prediction(count=n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, M, R, dtype=torch.complex64, generator=generator),
        torch.rand(count, R, generator=generator),
        torch.randn(count, N, R, dtype=torch.complex64, generator=generator),
    )


def write(path, parts, order=((4, 7), (0, 4)), **options):
    options.setdefault("macs", 3.24)
    with PredictionWriter(path, len(parts[1]), M, N, R, **options) as writer:
        for start, stop in order:
            writer.write(start, *(part[start:stop] for part in parts))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path, form):
    parts = prediction()
    path = tmp_path / f"predictions{form}"
    write(path, parts)
    for got, expected in zip(load_predictions(path), parts, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_chunks(tmp_path, form):
    """Real pairs, double precision, lazy conjugates and gradients give the same file."""
    U, S, V = prediction()
    path = tmp_path / f"p{form}"
    with PredictionWriter(path, n, M, N, R, macs=1.0) as writer:
        writer.write(0, torch.view_as_real(U)[:2], S[:2], torch.view_as_real(V)[:2])
        writer.write(2, U[2:4].to(torch.complex128), S[2:4].double(), V[2:4].to(torch.complex128))
        writer.write(4, U[4:6].mH.contiguous().mH, S[4:6], V[4:6].conj().resolve_conj().conj())
        writer.write(6, U[6:].clone().requires_grad_(), S[6:].clone().requires_grad_(), V[6:])
        writer.write(7, U[:0], S[:0], V[:0])
    for got, expected in zip(load_predictions(path), (U, S, V), strict=True):
        assert torch.equal(got, expected)


def test_contest_form(tmp_path):
    U, S, V = prediction()
    write(tmp_path / "p.npz", (U, S, V), macs=3.24)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as stored:
        assert sorted(stored.files) == ["C", "S", "U", "V"]
        assert (stored["U"].dtype, stored["U"].shape) == (np.float32, (n, M, R, 2))
        assert (stored["S"].dtype, stored["S"].shape) == (np.float32, (n, R))
        assert (stored["V"].dtype, stored["V"].shape) == (np.float32, (n, N, R, 2))
        assert stored["C"].shape == ()
        assert float(stored["C"]) == 3.24
        assert np.array_equal(stored["U"][..., 1], U.imag.numpy())
    with zipfile.ZipFile(tmp_path / "p.npz") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert torch.equal(open_channels(tmp_path / "p.npz", key="U").read(3)[0], U[3])


def test_npy_form(tmp_path):
    U, S, V = prediction()
    write(tmp_path / "p.npy", (U, S, V))
    stored = np.load(tmp_path / "p.npy", mmap_mode="r", allow_pickle=False)
    assert stored.shape == (n,)
    assert np.array_equal(stored["U"], U.numpy())
    assert np.array_equal(stored["S"], S.numpy())
    assert np.array_equal(stored["V"], V.numpy())


def test_torch_form(tmp_path):
    U, S, V = prediction()
    write(tmp_path / "p.pt", (U, S, V))
    stored = torch.load(tmp_path / "p.pt", weights_only=True)
    assert sorted(stored) == ["S", "U", "V", "macs"]
    assert torch.equal(stored["U"], U)
    assert stored["macs"] == 3.24
    write(tmp_path / "q.pt", (U, S, V), macs=None)
    assert sorted(torch.load(tmp_path / "q.pt", weights_only=True)) == ["S", "U", "V"]
    write(tmp_path / "q.npy", (U, S, V), macs=None)


# Refused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("existing", [False, True])
def test_failures_leave_everything_as_it_was(tmp_path, form, existing):
    path = tmp_path / f"p{form}"
    if existing:
        write(path, prediction(seed=9))
    before = path.read_bytes() if existing else None
    U, S, V = prediction()
    U_nan, S_inf = U.clone(), S.clone()
    U_nan[5, 0, 0] = complex(0, float("nan"))
    S_inf[4, 2] = float("inf")

    def gap(writer):
        writer.write(0, U[:3], S[:3], V[:3])
        writer.write(4, U[4:], S[4:], V[4:])

    cases = [
        (ValueError, r"expected 7 samples, got 6; sample 3 was never written", gap),
        (ValueError, r"samples 1 to 8 lie outside the 7 announced", lambda w: w.write(1, U, S, V)),
        (ValueError, r"samples -1 to 6 lie outside", lambda w: w.write(-1, U, S, V)),
        (ValueError, r"p\.\w+: U: sample 5 holds NaN or Inf", lambda w: w.write(0, U_nan, S, V)),
        (ValueError, r"S: sample 4 holds NaN or Inf", lambda w: w.write(0, U, S_inf, V)),
        (ValueError, r"V: expected shape \(7, 5, 3\).*got \(7, 6, 3\)", lambda w: w.write(0, U, S, U)),
        (ValueError, r"S: expected shape \(7, 3\), got \(6, 3\)", lambda w: w.write(0, U, S[:6], V)),
        (TypeError, r"S: expected a real floating tensor", lambda w: w.write(0, U, S + 0j, V)),
        (TypeError, r"U: expected a real floating tensor", lambda w: w.write(0, U.real.int(), S, V)),
        (TypeError, r"U: expected a tensor", lambda w: w.write(0, U.tolist(), S, V)),
        (KeyboardInterrupt, None, lambda w: [w.write(0, U, S, V), os.kill(os.getpid(), signal.SIGINT)]),
    ]
    for error, sentence, use in cases:
        with (
            pytest.raises(error, match=sentence),
            PredictionWriter(path, n, M, N, R, macs=1.0, overwrite=existing) as writer,
        ):
            use(writer)
        assert names(tmp_path) == ([path.name] if existing else [])
        assert not existing or path.read_bytes() == before


@pytest.mark.parametrize("form", FORMS)
def test_existing_output_is_refused(tmp_path, form):
    path = tmp_path / f"p{form}"
    write(path, prediction())
    before = path.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"p\.\w+ exists; it is replaced only with overwrite \(--overwrite\)$"
    ):
        PredictionWriter(path, n, M, N, R, macs=1.0)
    assert path.read_bytes() == before
    parts = prediction(seed=1)
    write(path, parts, overwrite=True)
    assert torch.equal(load_predictions(path)[0], parts[0])


def test_double_precision_that_single_cannot_hold(tmp_path):
    U, S, V = (x.to(torch.promote_types(x.dtype, torch.float64)) for x in prediction())
    large, small, tail = S.clone(), S.clone(), S.clone()
    large[5, 1], small[5], tail[5, 2] = 1e39, 1e-60, 1e-60
    wide = V.clone()
    wide[6, 0, 0] = 1e39j
    for parts, words in [
        ((U, large, V), "S: sample 105 holds values beyond the range of float32"),
        ((U, small, V), "S: sample 105 holds values below the range of float32 alone"),
        ((U, S, wide), "V: sample 106 holds values beyond the range of float32"),
        ((U, S, torch.view_as_real(wide)), "V: sample 106 holds values beyond the range of float32"),
    ]:
        path = tmp_path / "p.pt"
        with (
            pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {words}')}$"),
            PredictionWriter(path, 200, M, N, R) as writer,
        ):
            writer.write(100, *parts)
    write(tmp_path / "p.pt", (U, tail, V))
    assert load_predictions(tmp_path / "p.pt")[1][5, 2] == 0


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    U, S, V = prediction()
    writer = PredictionWriter(tmp_path / "p.pt", n, M, N, R).__enter__()
    writer.write(0, U, S, V)
    (tmp_path / "p.pt").write_text("someone else's")
    with pytest.raises(FileExistsError):
        writer.__exit__(None, None, None)
    assert (tmp_path / "p.pt").read_text() == "someone else's"
    assert names(tmp_path) == ["p.pt"]


def test_constructor_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"p\.csv: expected a file ending in \.npz, \.npy, \.pt, got \.csv"):
        PredictionWriter(tmp_path / "p.csv", n, M, N, R)
    for use in (lambda: PredictionWriter("", n, M, N, R), lambda: load_predictions("")):
        with pytest.raises(ValueError, match=r"path: expected a file ending in .*, got an empty path"):
            use()
    with pytest.raises(ValueError, match=r"expected macs, got None"):
        PredictionWriter(tmp_path / "p.npz", n, M, N, R)
    with pytest.raises(ValueError, match=r"expected finite macs, got nan"):
        PredictionWriter(tmp_path / "p.npz", n, M, N, R, macs=float("nan"))
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        PredictionWriter(tmp_path / "nowhere" / "p.pt", n, M, N, R)
    for sizes in ((0, M, N, R), (n, M, N, 0), (n, M, N, 6), (n, 0, N, 1)):
        with pytest.raises(ValueError, match=r"1 <= r <= min\(M, N\), got n="):
            PredictionWriter(tmp_path / "p.pt", *sizes)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        PredictionWriter(tmp_path / "p.pt", n, M, N, R).write(0, *prediction())
    assert names(tmp_path) == []


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_predictions(tmp_path / "p.npz")
    for form in FORMS:
        path = tmp_path / f"p{form}"
        write(path, prediction())
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", pickle.dumps(Bomb(), protocol=2)):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected predictions"):
                load_predictions(path)
    np.savez(tmp_path / "p.npz", U=np.zeros((2, M, R, 2), np.float32), S=np.zeros((2, R), np.float32))
    with pytest.raises(ValueError, match=r"expected the arrays U, S and V, got U, S$"):
        load_predictions(tmp_path / "p.npz")
    U, S, V = prediction()
    torch.save({"U": U, "S": S, "V": V[1:]}, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=r"expected V of 7 samples and rank 3, got complex64 \(6, 5, 3\)"):
        load_predictions(tmp_path / "p.pt")
    np.save(tmp_path / "p.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"got none of them"):
        load_predictions(tmp_path / "p.npy")
    (tmp_path / "p.txt").touch()
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        load_predictions(tmp_path / "p.txt")


FORKED = """
    import os, resource, signal, sys, traceback
    from pathlib import Path
    import torch
    from lomacs_fast.data.output import PredictionWriter
    torch.set_num_threads(1)
    b = 64
    U, S = torch.ones(b, 64, 32, dtype=torch.complex64), torch.ones(b, 32)

    def forked(action, *arguments):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                action(*arguments)
                code = 0
            except OSError:
                code = 3
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def write(path, count):
        with PredictionWriter(path, b * count, 64, 64, 32, macs=1.0, overwrite=True) as writer:
            for k in range(count):
                writer.write(b * k, U, S, U)
"""


def run(code, *arguments):
    """The exit codes that the script prints, of processes of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED) + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()], done.stderr


def test_memory_is_bounded(tmp_path):
    """64 MiB of predictions under a limit of data memory that could not hold half of them."""
    paths = [tmp_path / f"p{form}" for form in FORMS]
    codes, errors = run(
        """
        def action(path):
            write(path, 1)
            status = open("/proc/self/status").read()
            limit = int(status.split("VmData:")[1].split()[0]) * 1024 + 24 * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            write(path, 32)

        for path in sys.argv[1:]:
            print(forked(action, path))
        """,
        *paths,
    )
    assert codes == [0, 0, 0], errors
    for path in paths:
        assert path.stat().st_size > 2**26
        assert load_predictions(path)[2][2047, 63, 31] == 1


def test_killed_while_writing(tmp_path):
    paths = [tmp_path / f"p{form}" for form in FORMS]
    for path in paths:
        write(path, prediction())
    before = [path.read_bytes() for path in paths]
    codes, _ = run(
        """
        def action(path):
            with PredictionWriter(path, b, 64, 64, 32, macs=1.0, overwrite=True) as writer:
                writer.write(0, U, S, U)
                os.kill(os.getpid(), signal.SIGKILL)

        for path in sys.argv[1:]:
            print(forked(action, path))
        """,
        *paths,
    )
    assert codes == [-signal.SIGKILL] * 3
    assert [path.read_bytes() for path in paths] == before
    assert len(names(tmp_path)) > len(paths)
    for path in paths:
        write(path, prediction(), overwrite=True)
    assert names(tmp_path) == sorted(path.name for path in paths)


def test_full_disk(tmp_path):
    """Refused as the chunks arrive (2 MB) or as they are put together (10 MB): nothing is lost or left."""
    paths = [tmp_path / f"p{form}" for form in FORMS]
    for path in paths:
        write(path, prediction())
    before = [path.read_bytes() for path in paths]
    codes, errors = run(
        """
        def action(path, limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                write(path, 8)
            except OSError as error:
                assert error.filename == path or str(error).startswith(f"{path}: "), repr(error)
                raise

        for path in sys.argv[1:]:
            print(forked(action, path, 2_000_000), forked(action, path, 10_000_000))
        """,
        *paths,
    )
    assert codes == [3] * 6, errors
    assert [path.read_bytes() for path in paths] == before
    assert names(tmp_path) == sorted(path.name for path in paths)


# Files


def write_half(target):
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise InterruptedError


def test_atomic_path(tmp_path):
    target = tmp_path / "report.json"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(InterruptedError):
        write_half(target)
    assert target.read_text() == "one"
    with (
        pytest.raises(FileExistsError, match="exists; it is replaced only with overwrite"),
        atomic_path(target, overwrite=False),
    ):
        raise AssertionError("the body ran")
    with atomic_path(target) as temporary:
        temporary.write_text("two")
    assert target.read_text() == "two"
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "two"
    assert names(tmp_path) == ["report.json"]


def test_atomic_path_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_path_follows_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real/a.txt")
    with atomic_path(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real/a.txt").read_text() == "new"
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        refuse_existing(tmp_path / "dangling", overwrite=False)


def test_atomic_path_refuses(tmp_path):
    with pytest.raises(ValueError, match="got a folder"), atomic_path(tmp_path):
        raise AssertionError("the body ran")
    with (
        pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"),
        atomic_path(tmp_path / "nowhere" / "a.txt"),
    ):
        raise AssertionError("the body ran")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_target(tmp_path):
    target = tmp_path / "report.json"
    with pytest.raises(OSError, match="No space") as caught, atomic_path(target):
        Path("/dev/full").write_text("x" * 10**6)
    assert caught.value.filename == str(target)
    rows = np.zeros((1000, 1000))
    with NpyWriter("/dev/full", rows.shape, rows.dtype, target=target) as writer:
        with pytest.raises(OSError, match="No space") as caught:
            writer.write(0, rows)
        assert caught.value.filename == str(target)
        with pytest.raises(OSError, match="No space") as caught:
            writer.close()
        assert caught.value.filename == str(target)


def test_errors_name_the_target(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    with pytest.raises(FileNotFoundError) as caught, atomic_path(target):
        pass
    assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as caught:
        NpyWriter(tmp_path / "nowhere" / "x.npy", (1, 2), np.float32, target=target)
    assert caught.value.filename == str(target)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught, atomic_path(target) as temporary:
        temporary.write_text("one")
    assert caught.value.filename == str(target)
    temporary = temporary_beside(target)
    temporary.write_text("one")
    with pytest.raises(OSError, match="Input/output error") as caught:
        replace_group([(temporary, target)])
    assert caught.value.filename == str(target)


def test_errors_about_other_things_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "input.txt").read_text()
    assert caught.value.filename == str(tmp_path / "input.txt")
    with pytest.raises(BrokenPipeError) as caught, atomic_path(tmp_path / "a.txt"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert caught.value.filename is None


def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_ended_processes_alone_are_removed(tmp_path):
    target = tmp_path / "p.npz"
    mine = temporary_beside(target)
    machine, pid = mine.name.split("-")[1:3]
    assert pid == str(os.getpid())
    gone = ended()
    other = "00000000" if machine != "00000000" else "11111111"
    stale = f".p.tmp-{machine}-{gone}-0123456789ab.npz"
    kept = [
        mine.name,
        stale.replace(machine, other),
        stale.replace(".p.", ".q."),
        stale.replace(".p.", ".p.x."),
        stale.replace(".npz", ".npy"),
        stale.replace("tmp", "U"),
        stale.replace("0123456789ab", "0123456789"),
        f".p.tmp-{machine}-{os.getppid()}-0123456789ab.npz",
        ".p.tmp-0123456789ab.npz",
    ]
    for name in (*kept, stale):
        (tmp_path / name).write_text(name)
    remove_stale(target)
    assert names(tmp_path) == sorted(kept)
    (tmp_path / stale).touch()
    with atomic_path(target) as temporary:
        assert stale not in names(tmp_path)
        temporary.write_text("whole")
    assert names(tmp_path) == sorted([*kept, "p.npz"])


def test_moved_files_are_kept_while_their_target_is_missing(tmp_path):
    target = tmp_path / "H.npy"
    machine = temporary_beside(target).name.split("-")[1]
    backup = tmp_path / f".H.old-{machine}-{ended()}-0123456789ab.npy"
    backup.write_text("all that is left")
    remove_stale(target, "old")
    assert backup.read_text() == "all that is left"
    assert left_behind(target) == f"; an interrupted replacement left what stood there as {backup.name}"
    with pytest.raises(FileNotFoundError, match=rf"H\.npy: no such file; .* as {re.escape(backup.name)}$"):
        open_channels(target)
    temporary = temporary_beside(target)
    temporary.write_text("new")
    replace_group([(temporary, target)])
    assert names(tmp_path) == ["H.npy"]
    assert left_behind(target) == ""


def test_npy_writer(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    with NpyWriter(tmp_path / "x.npy", x.shape, x.dtype) as writer:
        writer.write(2, x[2:])
        assert (writer.missing, writer.rows_written) == (0, 2)
        writer.write(0, x[:2].astype(np.float64))
        assert (writer.missing, writer.rows_written) == (None, 4)
        with pytest.raises(ValueError, match="lie outside"):
            writer.write(3, x[:2])
        with pytest.raises(ValueError, match="expected rows of shape"):
            writer.write(0, x[..., 0])
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)
