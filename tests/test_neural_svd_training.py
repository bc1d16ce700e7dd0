"""What the networks are trained by, where the second document is wrong, sources, resume, tracking, the command."""

import doctest
import json
import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import lomacs_fast.cli
from lomacs_fast import NeuralSVD, functional, neural_svd
from lomacs_fast.neural_svd import FactorMLP, open_matrix
from lomacs_fast.neural_svd import factors as factors_module
from lomacs_fast.neural_svd import solver as solver_module

C = torch.complex64


def normal(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_the_examples_run():
    for module in (solver_module, factors_module):
        assert doctest.testmod(module).failed == 0


def test_an_embedding_row_is_the_mlp_of_a_one_hot_vector():
    for dtype in (torch.complex64, torch.float32):
        net = FactorMLP(9, 4, dtype, hidden=6, generator=torch.Generator().manual_seed(0))
        first = torch.nn.functional.linear(torch.eye(9), net.embedding.T, net.bias)
        out = (torch.relu(first) @ net.weight + net.offset) / 3
        want = torch.complex(out[:, :4], out[:, 4:]) if dtype.is_complex else out
        index = torch.tensor([3, 0, 3])
        torch.testing.assert_close(net(), want)
        torch.testing.assert_close(net(index), want[index])


def test_networks_are_regressed_onto_a_table():
    Q = torch.linalg.qr(normal(20, 3, dtype=C))[0]
    net = NeuralSVD(20, 20, 3, net="mlp", orth="qr", generator=torch.Generator().manual_seed(0))
    assert net.f_net.fit_to_table(Q) < 0.02
    before = net.g_net().detach()
    assert max(net.project()) < 0.02
    for x in net.factors():
        assert torch.linalg.vector_norm(x.mH @ x - torch.eye(3)) < 0.1
    # the projection keeps the span and the first column's direction
    after = net.factors()[1]
    assert abs(torch.vdot(before[:, 0], after[:, 0])) > 0.99 * before[:, 0].norm() * after[:, 0].norm()


def small(orth="penalty", nesting="none", lam=0.7):
    return NeuralSVD(
        12, 10, 3, dtype=torch.complex128, net="table", orth=orth, nesting=nesting, lam=lam,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def test_the_mean_over_minibatches_is_the_whole_loss():
    """The document takes the sampled block's diagonal, unscaled, and squares one sample's Gram matrix."""
    net, H = small(), normal(12, 10)
    F, G = net.factors()
    ours, diagonal, squared = [], [], []
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3000):
            rows, columns = (torch.randint(n, (8,), generator=generator) for n in (12, 10))
            block = H[rows][:, columns]
            ours.append(torch.stack(net.terms(block, rows, columns)))
            f, g = F[columns], G[rows]
            diagonal.append(-2 * torch.einsum("bl,bb,bl->", g.conj(), block, f).real)
            gram = f.mH @ f / 8 * 10 - torch.eye(3)
            squared.append(gram.abs().square().sum())
        whole = torch.stack(net.terms(H))
        mean, error = torch.stack(ours).mean(0), torch.stack(ours).std(0) / 3000**0.5
        assert ((mean - whole).abs() < 4 * error).all()
        cross = -2 * torch.einsum("ml,mn,nl->", G.conj(), H, F).real
        values = torch.stack(diagonal)
        assert (values.mean() - cross).abs() > 4 * values.std() / 3000**0.5
        values, exact = torch.stack(squared), (F.mH @ F - torch.eye(3)).abs().square().sum()
        assert values.mean() - exact > 4 * values.std() / 3000**0.5


def test_orthonormal_columns_cost_nothing():
    """The document's Gram matrix over the batch is I / N at orthonormal columns, not I."""
    net = small()
    F, G = (torch.linalg.qr(normal(n, 3))[0] for n in (10, 12))
    net.start_from(G, F)
    assert net.terms(normal(12, 10))[1] < 1e-20
    assert torch.linalg.vector_norm(F.mH @ F / 10 - torch.eye(3)) > 1


def test_orthonormality_alone_leaves_the_vectors_free():
    """The document holds `G^H H F` to be diagonal; any rotation of both leaves objective and penalty alone."""
    H = normal(12, 10)
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    F, G = Vh.mH[:, :3], U[:, :3] * S[:3]
    turn = torch.linalg.qr(normal(3, 3, seed=3))[0]
    core = (G @ turn).mH @ H @ (F @ turn)
    assert (core - torch.diag(core.diagonal())).abs().max() > 0.1 * S[0]
    for nesting, free in (("none", True), ("joint", False), ("sequential", True)):
        values = [functional.low_rank_loss(X, Y, H, nesting) for X, Y in ((F, G), (F @ turn, G @ turn))]
        assert (abs(values[0] - values[1]) < 1e-10 * abs(values[0])) == free
    # sequential nesting has the value of none, and a gradient that pulls the rotated columns apart
    X, Y = (F @ turn).requires_grad_(), (G @ turn).requires_grad_()
    for nesting, still in (("none", True), ("sequential", False)):
        grads = torch.autograd.grad(functional.low_rank_loss(X, Y, H, nesting), (X, Y))
        assert (max(g.abs().max() for g in grads) < 1e-10 * S[0]) == still


def test_the_second_term_is_a_trace():
    """The document's `|F^T F| |G^H G|` is another number, in the complex case and in the real one."""
    F, G, H = normal(10, 3, seed=1), normal(12, 3, seed=2), normal(12, 10, seed=3)
    loss = functional.low_rank_loss(F, G, H)
    norm = torch.linalg.vector_norm
    torch.testing.assert_close(loss, norm(H - G @ F.mH).square() - norm(H).square())
    cross = torch.trace(G.mH @ H @ F).real
    assert abs(-2 * cross + norm(F.mT @ F) * norm(G.mH @ G) - loss) > 0.01 * abs(loss)


def test_hard_orthonormality_leaves_no_singular_values_in_the_norms():
    net = small(orth="qr")
    net.project()
    for X in net.factors():
        torch.testing.assert_close(X.norm(dim=0), torch.ones(3, dtype=torch.float64))
    H = normal(12, 10)
    norms, rayleigh = (net.extract(H, sigma)[1] for sigma in ("norms", "rayleigh"))
    torch.testing.assert_close(norms, torch.ones(3, dtype=torch.float64))
    U, _, V = net.extract(H)
    torch.testing.assert_close(rayleigh, torch.diag(U.mH @ H @ V).real)


def test_lam_balances_the_gradients():
    net, H = small(lam=1.0), normal(12, 10)
    net.balance(H)
    main, orth = net.terms(H)
    sizes = []
    for term in (main, net.lam * orth):
        grads = torch.autograd.grad(term, list(net.parameters()), retain_graph=True)
        sizes.append(math.sqrt(sum(float(g.abs().square().sum()) for g in grads)))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


def low_rank(M, N, seed=0):
    U, V = (torch.linalg.qr(normal(n, 12, dtype=C, seed=seed + k))[0] for k, n in enumerate((M, N)))
    return (U * 0.7 ** torch.arange(12.0)) @ V.mH


def test_every_source_gives_the_same(tmp_path):
    H = low_rank(50, 40)
    np.save(tmp_path / "H.npy", H.numpy())
    want = neural_svd(H, 3, method="optimize")
    aslinearoperator = pytest.importorskip("scipy.sparse.linalg").aslinearoperator
    sources = (
        H.numpy(),
        np.load(tmp_path / "H.npy", mmap_mode="r"),
        np.asfortranarray(H.numpy())[::-1][::-1],
        aslinearoperator(H.numpy()),
    )
    for source in sources:
        found = neural_svd(source, 3)
        assert found.method == "optimize"
        torch.testing.assert_close(found.S, want.S, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.V.abs(), want.V.abs(), rtol=0, atol=1e-2)
        if not hasattr(source, "matmat"):
            assert found.rel_error == pytest.approx(want.rel_error, rel=1e-3)
    assert math.isnan(found.rel_error)
    with pytest.raises(ValueError, match="linear operator and has no blocks"):
        neural_svd(sources[-1], 3, net="mlp")
    with pytest.raises(ValueError, match="H must be finite"):
        neural_svd(lambda r, c: H[r][:, c] * float("nan"), 3, shape=H.shape)
    assert open_matrix(sources[1]).dtype == C


class Killed(Exception):
    pass


class Watched:
    """A matrix by blocks that fails at one of its visits."""

    def __init__(self, H, fails=None):
        self.H, self.shape, self.dtype, self.left = H, H.shape, H.dtype, fails

    def __call__(self, rows, columns):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        return self.H[rows][:, columns]


@pytest.mark.parametrize(
    "run", [{"tol": 1e-4}, {"orth": "penalty", "batch": 16, "max_steps": 30}, {"energy": 0.9999}]
)
def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path):
    H = low_rank(50, 40)
    rank = None if "energy" in run else 3
    whole = neural_svd(Watched(H), rank, **run)
    path = tmp_path / "run.ckpt"
    with pytest.raises(Killed):
        neural_svd(Watched(H, 7), rank, checkpoint=path, checkpoint_every=2, **run)
    step = torch.load(path, weights_only=True)["state_dict"]["step"]
    assert 0 < step < whole.steps
    again = neural_svd(Watched(H), rank, checkpoint=path, resume=True, **run)
    assert again.steps == whole.steps
    assert again.history["loss"] == whole.history["loss"]
    for name in ("U", "S", "V"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    with pytest.raises(ValueError, match="has seed = 0, the call 1"):
        neural_svd(Watched(H), rank, checkpoint=path, resume=True, seed=1, **run)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        neural_svd(Watched(H), rank, checkpoint=tmp_path / "none.ckpt", resume=True, **run)


MEMORY = """
import resource, sys
import numpy as np, torch
from lomacs_fast import neural_svd
from lomacs_fast.neural_svd import sources
sources.STRIP = 1 << 21
torch.set_num_threads(1)
small = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
neural_svd(small, 4, max_steps=1)
H = np.load(sys.argv[1], mmap_mode="r")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = neural_svd(H, 4, max_steps=3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found.rel_error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB, and madvise, are Linux's")
def test_a_memory_map_is_never_in_memory(tmp_path):
    side = 4000
    file = np.lib.format.open_memmap(tmp_path / "H.npy", "w+", np.float32, (side, side))
    u = np.linspace(1, 2, side, dtype=np.float32)
    for i in range(0, side, 500):
        file[i : i + 500] = u[i : i + 500, None] * u[None]
    file.flush()
    del file
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "H.npy")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown, error = done.stdout.split()
    assert float(error) < 0.5
    # of 61 MiB
    assert int(grown) < 32 * 1024


PROCESSES = """
import sys
import torch
from lomacs_fast import neural_svd
torch.set_num_threads(1)
H = torch.load(sys.argv[1], weights_only=True)
read = []
def blocks(rows, columns):
    read.append(len(range(*rows.indices(len(H)))))
    return H[rows][:, columns]
found = neural_svd(blocks, 3, shape=H.shape, tol=1e-4)
rank = torch.distributed.get_rank()
torch.save((found.U, found.S, found.V, max(read)), f"{sys.argv[2]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_rows(tmp_path):
    H = low_rank(51, 40)
    torch.save(H, tmp_path / "H.pt")
    (tmp_path / "run.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path / "H.pt"), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (first[3], second[3]) == (25, 26)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))
    alone = neural_svd(Watched(H), 3, tol=1e-4)
    torch.testing.assert_close(first[1], alone.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(first[2], alone.V, rtol=0, atol=1e-3)


def test_tracking_a_channel_over_time():
    phy = pytest.importorskip("sionna.phy")
    from sionna.phy.channel import GenerateOFDMChannel, gen_single_sector_topology, tr38901
    from sionna.phy.ofdm import ResourceGrid

    phy.config.seed = 1
    array = {"polarization": "dual", "polarization_type": "cross", "carrier_frequency": 3.5e9}
    base, user = (
        tr38901.PanelArray(num_rows_per_panel=n, num_cols_per_panel=2 * n, antenna_pattern=pattern, **array)
        for n, pattern in ((4, "38.901"), (2, "omni"))
    )
    model = tr38901.UMi(
        carrier_frequency=3.5e9, o2i_model="low", ut_array=user, bs_array=base, direction="downlink"
    )
    model.set_topology(*gen_single_sector_topology(1, 1, "umi", min_ut_velocity=1, max_ut_velocity=3))
    grid = ResourceGrid(num_ofdm_symbols=14, fft_size=4, subcarrier_spacing=30e3, num_tx=1)
    h = GenerateOFDMChannel(model, grid, normalize_channel=True)(1)
    H = h[0, 0, :, 0, :, :, 0].permute(2, 0, 1).to(C)
    found = [neural_svd(H[0], 4, method="optimize")]
    colds = []
    for k, X in enumerate(H[1:]):
        colds.append(neural_svd(X, 4, method="optimize", seed=k))
        last = found[-1]
        found.append(neural_svd(X, 4, method="optimize", init=last, phase="reference", reference=last))
        assert 5 * found[-1].steps <= colds[-1].steps
        torch.testing.assert_close(found[-1].S, torch.linalg.svdvals(X)[:4], rtol=1e-3, atol=0)

    def jumps(results):
        return max(float((x.U - y.U).abs().max()) for x, y in pairwise(results))

    assert jumps(found) < 0.02
    # from nothing every symbol has phases of its own
    assert jumps(colds) > 0.2


def command(*words):
    return lomacs_fast.cli.main(["svd", *map(str, words), "--progress", "false"])


def test_the_command(tmp_path, capsys):
    H = low_rank(50, 40)
    np.save(tmp_path / "H.npy", H.numpy())
    np.save(tmp_path / "B.npy", torch.stack([H, 2 * H]).numpy())
    out = tmp_path / "svd.npz"
    written = ("--json", tmp_path / "svd.json", "--figure", tmp_path / "svd.png")
    pytest.importorskip("matplotlib")
    assert (
        command("--input", tmp_path / "H.npy", "--trim", 0.1, "--method", "optimize", "--out", out, *written)
        == 0
    )
    facts = json.loads((tmp_path / "svd.json").read_text())
    assert facts["method"] == "optimize"
    assert facts["vectors"] == "individual"
    kept = int((0.7 ** torch.arange(12.0) >= 0.1).sum())
    assert facts["rank"] == kept
    with np.load(out) as found:
        torch.testing.assert_close(
            torch.from_numpy(found["S"]), 0.7 ** torch.arange(float(kept)), rtol=1e-3, atol=0
        )
        assert found["U"].shape == (50, kept)
        assert found["Vh"].shape == (kept, 40)
    assert (tmp_path / "svd.png").stat().st_size > 1000
    assert command("--input", tmp_path / "B.npy", "--rank", 2, "--out", tmp_path / "b.npz") == 0
    with np.load(tmp_path / "b.npz") as found:
        assert found["U"].shape == (2, 50, 2)
    capsys.readouterr()
    for words, message in (
        (("--input", tmp_path / "H.npy", "--rank", 2, "--out", out), "exists; it is replaced only with"),
        (
            ("--input", tmp_path / "H.npy", "--rank", 99, "--out", tmp_path / "c.npz"),
            "at most min(M, N) = 40, got 99",
        ),
        (("--input", tmp_path / "none.npy", "--rank", 2, "--out", tmp_path / "c.npz"), "no such file"),
        (("--input", tmp_path / "H.npy", "--rank", 2, "--out", tmp_path / "c.txt"), "ending in .npz"),
    ):
        assert command(*words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "c.npz").exists()
