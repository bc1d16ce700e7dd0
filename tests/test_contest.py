"""The contest's folder: streamed out, read back, refused by one sentence, never left half-written."""

import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lomacs_fast.data import files
from lomacs_fast.data.contest import (
    ContestConfig,
    ContestWriter,
    contest_path,
    open_contest,
    read_config,
    write_config,
    write_contest,
)

M, N, R = 6, 4, 3


def channels(n, seed, m=M, k=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, k, dtype=torch.complex64, generator=generator)


def chunks(*pieces, size=3):
    for start in range(0, len(pieces[0]), size):
        yield tuple(piece[start : start + size] for piece in pieces)


def write(folder, scenario=1, *, n_train=8, n_test=5, seed=0, **options):
    train = channels(n_train, seed), channels(n_train, seed + 1)
    test = channels(n_test, seed + 2), channels(n_test, seed + 3)
    write_contest(
        folder,
        scenario,
        M=M,
        N=N,
        r=R,
        train=chunks(*train),
        n_train=n_train,
        test=chunks(*test),
        n_test=n_test,
        **options,
    )
    return (*train, *test)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip(tmp_path):
    written = {scenario: write(tmp_path / "data", scenario, seed=10 * scenario) for scenario in (10, 2, 1)}
    opened = open_contest(tmp_path / "data")
    assert [s.scenario for s in opened] == [1, 2, 10]
    assert [s.scenario for s in open_contest(tmp_path / "data", scenarios=[10, 1])] == [1, 10]
    for s in opened:
        assert (s.round, s.config) == (1, ContestConfig(8, M, N, R))
        sources = (s.train_input, s.train_label, s.test_input, s.test_label)
        for source, expected in zip(sources, written[s.scenario], strict=True):
            assert torch.equal(source.read(slice(None)), expected)
    assert (tmp_path / "data/Round1CfgData2.txt").read_text() == f"8\n{M}\n{N}\n2\n{R}\n"
    stored = np.load(tmp_path / "data/Round1TrainData2.npy")
    assert (stored.dtype, stored.shape) == (np.float32, (8, M, N, 2))
    assert np.array_equal(stored[..., 1], written[2][0].imag.numpy())
    assert len(contents(tmp_path / "data")) == 15


def test_forms_of_chunks(tmp_path):
    """Complex and real, lazy conjugates, double precision and NumPy give the same file."""
    x = channels(4, 0)
    forms = {
        "complex": x,
        "lazy": x.mH.contiguous().mH,
        "double": x.to(torch.complex128),
        "real": torch.view_as_real(x),
        "numpy": x.numpy(),
        "real numpy": torch.view_as_real(x).numpy().astype(np.float64),
        "gradient": x.clone().requires_grad_(),
    }
    for k, form in enumerate(forms.values()):
        with ContestWriter(tmp_path, k, M=M, N=N, r=R, n_train=4) as writer:
            writer.train(form[:1], form[:1])
            writer.train(form[1:1], form[1:1])
            writer.train(form[1:], form[1:])
    for s in open_contest(tmp_path):
        assert torch.equal(s.train_input.read(slice(None)), x), list(forms)[s.scenario]
        assert s.test_input is None
        assert s.test_label is None


def test_test_data_only_and_no_test_label(tmp_path):
    x = channels(5, 0)
    write_contest(tmp_path, 1, round=3, M=M, N=N, r=R, test=[(x, None)], n_test=5, test_label=False)
    (s,) = open_contest(tmp_path)
    assert (s.round, s.train_input, s.train_label, s.test_label) == (3, None, None, None)
    assert torch.equal(s.test_input.read(slice(None)), x)


def test_rounds(tmp_path):
    write(tmp_path, 1, round=1)
    write(tmp_path, 1, round=2, seed=5)
    with pytest.raises(ValueError, match=r"holds the rounds 1, 2; name one with round \(--round\)$"):
        open_contest(tmp_path)
    with pytest.raises(ValueError, match=r"has no round 3; there are: 1, 2"):
        open_contest(tmp_path, round=3)
    (s,) = open_contest(tmp_path, round=2)
    assert torch.equal(s.train_input.read(slice(None)), channels(8, 5))


# The cfg


@pytest.mark.parametrize(
    "text", ["8\n6\n4\n2\n3\n", "8\r\n6\r\n4\r\n2\r\n3", "\ufeff8\n 6 \n4\t\n2\n3\n\n\n"]
)
def test_config_forms(tmp_path, text):
    (tmp_path / "cfg.txt").write_bytes(text.encode())
    assert read_config(tmp_path / "cfg.txt") == ContestConfig(8, 6, 4, 3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: expected the number of samples, the file ends after line 0"),
        ("8\n6\n4\n2\n", "line 5: expected r, the file ends after line 4"),
        ("eight\n6\n4\n2\n3", "line 1: expected the number of samples as an integer, got 'eight'"),
        ("8\n6.0\n4\n2\n3", "line 2: expected M as an integer, got '6.0'"),
        ("8\n6\n\n2\n3", "line 3: expected N as an integer, got ''"),
        ("8\n6\n-4\n2\n3", "line 3: expected N as an integer, got '-4'"),
        ("8\n6 4\n2\n3\n1", "line 2: expected M as an integer, got '6 4'"),
        ("8\n1\n4\n2\n1", "line 2: expected M of at least 2, got 1"),
        ("8\n6\n4\n1\n3", r"line 4: expected 2 \(real and imaginary part\), got 1"),
        ("8\n6\n4\n2\n0", r"line 5: expected r from 1 to min\(M, N\) = 4, got 0"),
        ("8\n6\n4\n2\n5", r"line 5: expected r from 1 to min\(M, N\) = 4, got 5"),
        ("8\n6\n4\n2\n3\n9", "line 6: expected five lines, got '9' after them"),
        ("8\n6\n4\n2\n\u0663", "line 5: expected r as an integer"),
        (b"\x93NUMPY\xff\xfe", "expected five lines of text"),
    ],
)
def test_config_refused(tmp_path, text, sentence):
    path = tmp_path / "Round1CfgData1.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{sentence}") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_config_written(tmp_path):
    config = ContestConfig(8, 6, 4, 3)
    write_config(tmp_path / "cfg.txt", config)
    assert read_config(tmp_path / "cfg.txt") == config
    with pytest.raises(FileExistsError, match=r"cfg\.txt exists"):
        write_config(tmp_path / "cfg.txt", ContestConfig(9, 6, 4, 3))
    assert read_config(tmp_path / "cfg.txt") == config
    write_config(tmp_path / "cfg.txt", ContestConfig(9, 6, 4, 3), overwrite=True)
    assert read_config(tmp_path / "cfg.txt").samples == 9
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_config(tmp_path / "other.txt")


@pytest.mark.parametrize("sizes", [(-1, 6, 4, 3), (8, 1, 4, 1), (8, 6, 1, 1), (8, 6, 4, 0), (8, 6, 4, 5)])
def test_impossible_sizes(tmp_path, sizes):
    samples, m, n, r = sizes
    with pytest.raises(ValueError, match=r"expected .*got"):
        ContestConfig(*sizes)
    with pytest.raises(ValueError, match=r"expected .*got"):
        ContestWriter(tmp_path, 1, M=m, N=n, r=r, n_train=samples)


# Opening what is wrong


@pytest.mark.parametrize(
    ("kind", "array", "error", "sentence"),
    [
        (
            "TrainData",
            np.zeros((7, M, N, 2), "f4"),
            ValueError,
            r"\(8, 6, 4, 2\) by Round1CfgData1\.txt, got \(7,",
        ),
        (
            "TrainLabel",
            np.zeros((9, M, N, 2), "f4"),
            ValueError,
            r"\(8, 6, 4, 2\) by Round1CfgData1\.txt, got \(9,",
        ),
        ("TrainData", np.zeros((8, N, M, 2), "f4"), ValueError, r"expected shape .*got \(8, 4, 6, 2\)"),
        (
            "TrainData",
            np.zeros((8, M, N), "f4"),
            ValueError,
            r"expected complex .*or real .*got real of shape",
        ),
        ("TrainData", np.zeros((2, 4, M, N, 2), "f4"), ValueError, r"expected shape .*got \(2, 4, 6, 4, 2\)"),
        ("TrainData", np.zeros((8, M, N, 2), "f8"), TypeError, r"expected float32 .*got float64"),
        ("TrainLabel", np.zeros((8, M, N, 2), "i4"), TypeError, r"got dtype int32"),
        ("TrainLabel", np.zeros((8, M, N), "c8"), TypeError, r"expects floats .*got complex"),
        ("TestData", np.zeros((5, M, 3, 2), "f4"), ValueError, r"\(n, 6, 4, 2\) by Round1CfgData1\.txt, got"),
        ("TestData", np.zeros((0, M, N, 2), "f4"), ValueError, r"holds no samples"),
        (
            "TestLabel",
            np.zeros((4, M, N, 2), "f4"),
            ValueError,
            r"\(5, 6, 4, 2\) by .*Round1TestData1\.npy, got \(4,",
        ),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, kind, array, error, sentence):
    write(tmp_path)
    path = contest_path(tmp_path, 1, kind, 1)
    np.save(path, array)
    with pytest.raises(error, match=rf"^{re.escape(str(path))}: .*{sentence}") as caught:
        open_contest(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_arrays(tmp_path):
    write(tmp_path)
    path = tmp_path / "Round1TrainLabel1.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"Round1TrainLabel1\.npy: truncated"):
        open_contest(tmp_path)
    np.save(path, np.array([None] * 8), allow_pickle=True)
    with pytest.raises(TypeError, match=r"Round1TrainLabel1\.npy: holds pickled"):
        open_contest(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"Round1TrainLabel1\.npy: .*the file is empty"):
        open_contest(tmp_path)


def test_not_finite_is_named_when_read(tmp_path):
    write(tmp_path)
    np.lib.format.open_memmap(tmp_path / "Round1TestData1.npy", mode="r+")[4, 1, 1, 0] = np.inf
    (s,) = open_contest(tmp_path)
    with pytest.raises(ValueError, match=r"Round1TestData1\.npy: sample 4 holds Inf"):
        s.test_input.read(slice(2, 5))


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (["CfgData"], r"Round1CfgData1\.txt: missing, it must describe Round1TestData1\.npy, "),
        (["TrainData"], r"Round1TrainData1\.npy: missing, Round1TrainLabel1\.npy needs it"),
        (["TrainLabel"], r"Round1TrainLabel1\.npy: missing, Round1TrainData1\.npy needs it"),
        (["TestData"], r"Round1TestData1\.npy: missing, Round1TestLabel1\.npy needs it"),
        (
            ["TrainData", "TrainLabel", "TestData", "TestLabel"],
            r"Round1CfgData1\.txt: describes no data, Round1TrainData1\.npy is missing",
        ),
    ],
)
def test_missing_files(tmp_path, gone, sentence):
    write(tmp_path)
    write(tmp_path, 2)
    for kind in gone:
        contest_path(tmp_path, 1, kind, 1).unlink()
    with pytest.raises(ValueError, match=sentence):
        open_contest(tmp_path)
    assert len(open_contest(tmp_path, scenarios=[2])) == 1


def test_wrong_folders_and_scenarios(tmp_path):
    with pytest.raises(ValueError, match=r"expected contest files such as .*there are none"):
        open_contest(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_contest(tmp_path / "nowhere")
    write(tmp_path, 1)
    write(tmp_path, 4)
    (tmp_path / "Round1TrainData01.npy").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"has no scenario 3 in round 1; there are: 1, 4$"):
        open_contest(tmp_path, scenarios=[1, 3])
    with pytest.raises(ValueError, match="expected at least one"):
        open_contest(tmp_path, scenarios=[])
    with pytest.raises(ValueError, match="expected a contest folder, got a file"):
        open_contest(tmp_path / "notes.txt")


def test_empty_paths_are_not_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for use in (
        open_contest,
        read_config,
        lambda path: contest_path(path, 1, "CfgData", 1),
        lambda path: write_config(path, ContestConfig(8, M, N, R), overwrite=True),
        lambda path: ContestWriter(path, 2, M=M, N=N, r=R, n_train=8),
    ):
        with pytest.raises(ValueError, match=r"^(folder|path|target): expected .*, got an empty path$"):
            use("")


# Writing what is wrong: nothing is left, nothing is lost


def fails(folder, error, sentence, use, **options):
    """`use(writer)` raises, and the folder is as it was before, its absence included."""
    before = contents(folder) if folder.exists() else None
    settings = {"M": M, "N": N, "r": R, "n_train": 8, "n_test": 5, **options}
    with pytest.raises(error, match=sentence), ContestWriter(folder, 1, **settings) as writer:
        use(writer)
    assert (contents(folder) if folder.exists() else None) == before


@pytest.mark.parametrize("existing", [False, True])
def test_failures_leave_the_folder_as_it_was(tmp_path, existing):
    folder = tmp_path / "new" / "data"
    if existing:
        write(folder)
    x, bad = channels(8, 3), channels(8, 3)
    bad[5, 1, 1] = float("nan")
    double = torch.full((8, M, N), 1e300, dtype=torch.complex128)

    def train(*pairs):
        return lambda writer: [writer.train(*pair) for pair in pairs]

    def interrupted(writer):
        writer.train(x, x)
        raise KeyboardInterrupt

    replace = {"overwrite": existing}
    fails(folder, ValueError, r"TrainData1\.npy: expected 8 samples, got 7", train((x[:7], x[:7])), **replace)
    fails(folder, ValueError, r"TestData1\.npy: expected 5 samples, got 0", train((x, x)), **replace)
    fails(folder, ValueError, r"expected 8 samples, got 9 or more", train((x, x), (x[:1], x[:1])), **replace)
    fails(folder, ValueError, "as many labels as inputs", train((x, x[:3])), **replace)
    fails(folder, ValueError, r"TrainLabel: sample 5 holds NaN", train((x, bad)), **replace)
    fails(folder, ValueError, r"beyond the range of float32", train((x, double)), **replace)
    fails(folder, ValueError, r"expected complex \(b, 6, 4\).*got \(8, 4, 6\)", train((x.mT, x)), **replace)
    fails(folder, TypeError, r"expected a tensor", train(([1.0], x)), **replace)
    fails(folder, ValueError, r"test label: expected one", lambda w: w.test(x[:5]), **replace)
    fails(
        folder,
        ValueError,
        r"test label: expected none",
        lambda w: w.test(x[:5], x[:5]),
        test_label=False,
        **replace,
    )
    fails(folder, KeyboardInterrupt, None, interrupted, **replace)
    assert existing or not folder.parent.exists()


def test_existing_output_is_refused(tmp_path):
    write(tmp_path)
    for kind in ("TestLabel", "CfgData"):
        before = contents(tmp_path)
        with pytest.raises(
            FileExistsError, match=r"exists; it is replaced only with overwrite \(--overwrite\)$"
        ):
            write(tmp_path, seed=50)
        assert contents(tmp_path) == before
        for path in tmp_path.glob("Round1T*1.npy"):
            if kind not in path.name:
                path.unlink()
    written = write(tmp_path, seed=50, overwrite=True)
    (s,) = open_contest(tmp_path)
    assert torch.equal(s.train_input.read(slice(None)), written[0])


def test_overwriting_removes_what_no_longer_belongs(tmp_path):
    write(tmp_path)
    x = channels(3, 9)
    write_contest(tmp_path, 1, M=M, N=N, r=R, train=[(x, x)], n_train=3, overwrite=True)
    assert sorted(contents(tmp_path)) == [
        "Round1CfgData1.txt",
        "Round1TrainData1.npy",
        "Round1TrainLabel1.npy",
    ]
    (s,) = open_contest(tmp_path)
    assert len(s.train_input) == 3


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    x = channels(8, 0)
    writer = ContestWriter(tmp_path, 1, M=M, N=N, r=R, n_train=8).__enter__()
    writer.train(x, x)
    (tmp_path / "Round1TrainLabel1.npy").write_text("someone else's")
    with pytest.raises(FileExistsError, match=r"Round1TrainLabel1\.npy exists"):
        writer.__exit__(None, None, None)
    assert contents(tmp_path) == {"Round1TrainLabel1.npy": b"someone else's"}


@pytest.mark.parametrize("n_test", [5, 0])
def test_a_failing_rename_is_undone(tmp_path, monkeypatch, n_test):
    """Whichever rename fails, the old scenario is whole again and nothing else is left."""
    write(tmp_path, n_test=n_test, test_label=n_test > 0)
    before = contents(tmp_path)
    rename = os.rename
    renames = len(before) + 5
    for step in range(1, renames + 1):
        calls = []

        def failing(source, target, step=step, calls=calls):
            calls.append(target)
            if len(calls) == step:
                raise OSError("no")
            rename(source, target)

        monkeypatch.setattr(files.os, "rename", failing)
        with pytest.raises(OSError, match="no"):
            write(tmp_path, seed=50, overwrite=True)
        monkeypatch.undo()
        assert contents(tmp_path) == before


FORKED = """
    import os, resource, shutil, signal, sys, traceback
    from pathlib import Path
    import torch
    from lomacs_fast.data import files
    from lomacs_fast.data.contest import ContestWriter, write_contest
    torch.set_num_threads(1)

    def forked(action):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                action()
                code = 0
            except OSError:
                code = 3
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code, folder):
    """The exit codes that the script prints, of processes of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED) + textwrap.dedent(code), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def visible(folder):
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def test_killed_while_writing(tmp_path):
    """SIGKILL in the middle of the data: the old scenario is whole and opens."""
    old = write(tmp_path)
    before = visible(tmp_path)
    codes = run(
        """
        def action():
            x = torch.ones(4, 6, 4, dtype=torch.complex64)
            with ContestWriter(sys.argv[1], 1, M=6, N=4, r=2, n_train=8, overwrite=True) as writer:
                writer.train(x, x)
                os.kill(os.getpid(), signal.SIGKILL)
        print(forked(action))
        """,
        tmp_path,
    )
    assert codes == [-signal.SIGKILL]
    assert visible(tmp_path) == before
    (s,) = open_contest(tmp_path)
    assert torch.equal(s.train_input.read(slice(None)), old[0])
    assert len(contents(tmp_path)) > len(before)
    write(tmp_path, seed=50, overwrite=True)
    assert sorted(contents(tmp_path)) == sorted(before)


def test_killed_while_renaming(tmp_path):
    """SIGKILL before each of the eight renames: no new files beside old ones under a cfg, and none lost."""
    old = write(tmp_path / "0")
    before = contents(tmp_path / "0")
    codes = run(
        """
        root = Path(sys.argv[1])
        x = torch.ones(8, 6, 4, dtype=torch.complex64)
        rename = os.rename

        def action(step):
            calls = []
            def dying(source, target):
                calls.append(target)
                if len(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(source, target)
            files.os.rename = dying
            write_contest(root / str(step), 1, M=6, N=4, r=2, train=[(x, x)], n_train=8, overwrite=True)

        for step in range(1, 10):
            shutil.copytree(root / "0", root / str(step))
            print(forked(lambda: action(step)))
        """,
        tmp_path,
    )
    assert codes == [-signal.SIGKILL] * 8 + [0]
    for step in range(1, 9):
        folder = tmp_path / str(step)
        if step == 1:
            (s,) = open_contest(folder)
            assert torch.equal(s.train_input.read(slice(None)), old[0])
        else:
            with pytest.raises(ValueError, match=r"Round1CfgData1\.txt: missing|there are none") as caught:
                open_contest(folder)
            kept = [name for name in contents(folder) if name.startswith(".Round1CfgData1.old-")]
            assert len(kept) == 1
            assert "; an interrupted replacement left " in str(caught.value)
            assert kept[0] in str(caught.value) or "there are none" in str(caught.value)
        assert set(before.values()) <= set(contents(folder).values())
        # what is given up while writing stays where it was, what is written removes all of it
        with pytest.raises(ValueError, match="expected 8 samples"):
            write_contest(folder, 1, M=M, N=N, r=R, n_train=8, overwrite=True)
        assert set(before.values()) <= set(contents(folder).values())
        write(folder, seed=50, overwrite=True)
        assert sorted(contents(folder)) == sorted(before)
    (s,) = open_contest(tmp_path / "9")
    assert torch.equal(s.train_input.read(slice(None)), torch.ones(8, 6, 4, dtype=torch.complex64))


def test_full_disk_and_bounded_memory(tmp_path):
    """A write that the file system refuses is an error, not a signal; 64 MiB pass in chunks of 2 MiB."""
    write(tmp_path)
    before = contents(tmp_path)
    codes = run(
        """
        x = torch.ones(64, 64, 64, dtype=torch.complex64)

        def stream(scenario, count):
            write_contest(
                sys.argv[1], scenario, M=64, N=64, r=2, train=((x, x) for _ in range(count)),
                n_train=64 * count, overwrite=True,
            )

        def full_disk():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
            try:
                stream(1, 2)
            except OSError as error:
                assert error.filename == str(Path(sys.argv[1]) / "Round1TrainData1.npy"), repr(error)
                raise

        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

        def bounded():
            stream(2, 1)
            before = peak()
            stream(3, 32)
            assert peak() - before < 16 * 1024

        print(forked(full_disk), forked(bounded))
        """,
        tmp_path,
    )
    assert codes == [3, 0]
    after = contents(tmp_path)
    assert {name: data for name, data in after.items() if "1." in name} == before
    assert sum(map(len, after.values())) > 2**27
    (s,) = open_contest(tmp_path, scenarios=[3])
    assert bool((s.train_label.read([0, 1000, 2047]) == 1).all())


def test_writer_outside_its_block(tmp_path):
    x = channels(8, 0)
    writer = ContestWriter(tmp_path, 1, M=M, N=N, r=R, n_train=8)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        writer.train(x, x)
    assert not contents(tmp_path)
    with pytest.raises(ValueError, match="got 0 of both"):
        ContestWriter(tmp_path, 1, M=M, N=N, r=R, n_train=0)
    with pytest.raises(ValueError, match="scenario: expected at least 0"):
        ContestWriter(tmp_path, -1, M=M, N=N, r=R, n_train=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder, got a file"):
        ContestWriter(tmp_path / "file", 1, M=M, N=N, r=R, n_train=1)
