"""`neural_svd`: the SVD of given matrices by optimisation of the low-rank objective."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomacs_fast.reference.arguments import integer, number, positive

from .advice import Advice, advise
from .descent import Held, State, Streamed, descend, start
from .extraction import PHASES, align, decompose, frobenius, numbers, orthogonality
from .factors import NESTINGS, NETS, ORTHS, NeuralSVD, one_of
from .fitting import fit
from .sources import DTYPES, MatrixSource, open_matrix

__all__ = ["NeuralSVDResult", "neural_svd"]

METHODS = ("auto", "optimize", "svd", "lowrank")
SIGMAS = ("rayleigh", "norms")
GUARD = 8  # columns beyond those asked for: the span converges by their singular value, not by the next one
FIRST = 16  # columns with which a search for an energy begins
START = 64  # columns of which the tail is trimmed
STEPS, FIT_STEPS = 200, 3000
FREE, INDIVIDUAL = "free", "individual"
BLOCK = 1024  # rows and columns of a minibatch of a matrix that is not in memory


@dataclass
class NeuralSVDResult:
    """U, S, V of `H ~ U diag(S) V^H` and how they were found.

    Attributes:
        U, S, V: `(..., M, L)`, `(..., L)` real and not negative, largest first, `(..., N, L)`.
        rel_error: `|H - U diag(S) V^H| / |H|`; a float, or a tensor `(...)` for a batch; 0 for a zero matrix,
            NaN for a linear operator without entries.
        span_error: `|H - U (U^H H V) V^H| / |H|`: what the spans leave, however their vectors are turned.
        ortho_error: the larger of `|U^H U - I|` and `|V^H V - I|`, like `rel_error`.
        vectors: "individual", or "free" where nothing fixed the vectors inside their span (no nesting): then
            S is the diagonal of `U^H H V` and no list of singular values.
        method: "optimize", "svd" or "lowrank"; advice: which of them is best here, and why.
        steps: optimisation steps; converged: whether they ended by `tol`.
        history: what was recorded at every step: "loss" and "change" (the largest relative step of a column),
            or "loss", "main", "orth" and "lam" of a training by Adam.
        spectrum: all singular values found, before a trim or a choice by energy, for `plots.plot_trim`.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    rel_error: Any
    ortho_error: Any
    span_error: Any
    vectors: str
    method: str
    advice: str
    steps: int
    converged: bool
    history: dict[str, list[float]] = field(repr=False)
    spectrum: Tensor = field(repr=False)
    # right vectors beyond V: the start of a next, similar matrix
    extra: Tensor | None = field(default=None, repr=False)

    @property
    def Vh(self) -> Tensor:
        """`V^H`, as `torch.linalg.svd` gives it."""
        return self.V.mH


@dataclass(frozen=True)
class _Wish:
    """The arguments, checked."""

    nesting: str
    phase: str
    sigma: str
    reference: tuple[Tensor, Tensor] | None
    tol: float
    max_steps: int | None
    seed: int
    progress: bool
    checkpoint: Path | None
    resume: bool
    every: int


def _pair(name: str, value: Any, shape: tuple[int, ...], like: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and V of a previous result or a pair."""
    if isinstance(value, NeuralSVDResult):
        value = value.U, value.V
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise TypeError(f"{name} must be a result of neural_svd or a pair U, V, got {type(value).__name__}")
    *batch, M, N = shape
    for x, n, side in zip(value, (M, N), "UV", strict=True):
        if x.shape[:-2] != tuple(batch) or x.ndim < 2 or x.shape[-2] != n:
            raise ValueError(f"{side} of {name} must have shape {(*batch, n, '*')}, got {tuple(x.shape)}")
        if x.is_complex() and not like.is_complex:
            raise TypeError(f"{side} of {name} must be real as H is, got {x.dtype}")
        if not bool(torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all()):
            raise ValueError(f"{side} of {name} must be finite")
    return value[0].to(like), value[1].to(like)


def _rank(rank: Any, small: int) -> int | None:
    if rank is None:
        return None
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != 2:
            raise ValueError(f"rank must be a number or a pair of transmit and receive chains, got {rank!r}")
        rank = min(integer("rank", n, 1) for n in rank)
        return min(rank, small)
    found = integer("rank", rank, 1)
    if found > small:
        raise ValueError(f"rank must be at most min(M, N) = {small}, got {found}")
    return found


def _share(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 < found < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {found}")
    return found


def _largest(H: Tensor) -> Tensor:
    """The largest real or imaginary part of every matrix, without its sign; `ValueError` for NaN or Inf."""
    low, high = numbers(H.resolve_neg()).aminmax(dim=-1)
    largest = torch.maximum(-low, high)
    # NaN passes through every extreme
    if not bool(largest.isfinite().all()):
        _finite(H)
    return largest


def _divided(X: Tensor, size: Tensor) -> Tensor:
    """X over real numbers, part by part: a complex division costs several times as much."""
    if not X.is_complex():
        return X / size
    return torch.view_as_complex(torch.view_as_real(X) / size[..., None])


def _finite(H: Tensor) -> None:
    finite = torch.isfinite(torch.view_as_real(H.resolve_conj()) if H.is_complex() else H)
    if not bool(finite.all()):
        where = ""
        if H.ndim > 2:
            bad = ~finite.reshape(-1, *finite.shape[H.ndim - 2 :]).flatten(1).all(1)
            where = f", matrix {int(bad.nonzero()[0])}"
        raise ValueError(f"H must be finite, it holds NaN or Inf{where}")


def _plain(x: Tensor) -> Any:
    return float(x) if x.ndim == 0 else x


def _measured(H: Held | Streamed, U: Tensor, S: Tensor, V: Tensor, W: Tensor) -> tuple[Any, Any, Any]:
    """rel_error, span_error, ortho_error; W is `H V`."""
    assert H.square is not None
    norm = H.square.sqrt()
    real = S.dtype
    safe = torch.where(norm > 0, norm, torch.ones_like(norm)).to(real)
    rel = H.residual(U, S, V).to(real) / safe
    core = U.mH @ W
    off = core - torch.diag_embed(S).to(core.dtype)
    # what the spans hold of the residual is off the diagonal: the rest is orthogonal to it
    span = (rel.square() - (frobenius(off) / safe).square()).clamp_min(0).sqrt()
    ortho = torch.maximum(orthogonality(U), orthogonality(V))
    return _plain(rel), _plain(span), _plain(ortho)


def _direct(H: Tensor, rank: int, method: str, wish: _Wish) -> tuple[Tensor, Tensor, Tensor]:
    if method == "svd":
        U, S, Vh = torch.linalg.svd(H, full_matrices=False)
        return U[..., :rank], S[..., :rank], Vh.mH[..., :rank]
    # random subspace iterations, of PyTorch's own generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wish.seed)
        U, S, V = torch.svd_lowrank(H, q=min(rank + GUARD, *H.shape[-2:]), niter=6)
    return U[..., :rank], S[..., :rank], V[..., :rank]


class _Bar:
    """Progress, where it is wanted and there is something to show it by."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar: Any = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="neural_svd", leave=False)

    def __call__(self, step: int, what: str) -> None:
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(what)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Checkpoints:
    """What a run writes every so many steps, and where it goes on."""

    def __init__(self, wish: _Wish, facts: dict[str, Any]) -> None:
        self.path, self.every, self.facts = wish.checkpoint, wish.every, facts
        first = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self.writes = self.path is not None and (first or torch.distributed.get_rank() == 0)
        self.found: dict[str, Any] | None = None
        if wish.resume:
            from lomacs_fast.training.checkpoints import read_checkpoint

            if self.path is None:
                raise ValueError("resume needs the path of a checkpoint")
            saved = read_checkpoint(self.path)
            for name, value in facts.items():
                if saved["lomacs_fast"]["architecture"].get(name) != value:
                    there = saved["lomacs_fast"]["architecture"].get(name)
                    raise ValueError(f"{self.path}: has {name} = {there}, the call {value}")
            self.found = saved["state_dict"]

    def write(self, step: int, state: dict[str, Any]) -> None:
        if self.writes and step % self.every == 0:
            from lomacs_fast.training.checkpoints import write_checkpoint

            assert self.path is not None
            entry = {"format": 1, "architecture": self.facts, "scenarios": [], "network": "neural_svd"}
            write_checkpoint({"state_dict": state, "lomacs_fast": entry}, self.path)


def neural_svd(
    H: Any,
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    net: str = "table",
    orth: str = "bjorck",
    nesting: str = "joint",
    phase: str = "sigma",
    method: str = "auto",
    lam: float | str = 1.0,
    sigma: str = "rayleigh",
    trim: float | None = None,
    reference: Any = None,
    init: Any = None,
    lr: float | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    seed: int | None = None,
    progress: bool = False,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
    batch: int | Sequence[int] | None = None,
    hidden: int = 128,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
) -> NeuralSVDResult:
    """The leading singular triplets of given matrices by optimisation, `H ~ U diag(S) V^H`.

    The networks F `(N, L)` and G `(M, L)` minimise `-2 Re tr(G^H H F) + tr(F^H F G^H G)`, which is
    `|H - G F^H|^2 - |H|^2`, with nesting masks that fix the individual vectors. A table with Björck's
    iteration (the default) takes `G = H F`, its exact minimiser, and steps of F by the gradient over its
    curvature (`reference.neural_svd_steps`): one pass over the matrix a step, some 10 to 20 steps from
    nothing. Everything else is trained by Adam.

        >>> import torch
        >>> from lomacs_fast import neural_svd
        >>> H = torch.randn(96, 64, dtype=torch.complex64)
        >>> found = neural_svd(H, rank=4, method="optimize", seed=0)
        >>> exact = torch.linalg.svdvals(H)[:4]
        >>> bool(((found.S - exact).abs() < 1e-3 * exact).all())
        True

    Args:
        H: a tensor `(M, N)`, or a batch `(..., M, N)` of small ones optimised together; a NumPy array or
            memory map, a callable `rows, columns -> block`, or a linear operator, as `open_matrix` says:
            never in memory at once. float32, float64, complex64 or complex128.
        rank: L; or a pair, the numbers of transmit and receive chains, of which the smaller is taken.
            min(M, N), the whole SVD, where neither this nor energy nor trim is given.
        energy: the smallest L whose squared singular values are at least this share of `|H|^2`, in (0, 1).
        net: "table" or "mlp".
        orth: "bjorck", "penalty" (`lam (|F^H F - I|^2 + |G^H G - I|^2)`), or "qr" at the ends of epochs.
        nesting: "joint" or "sequential" give the individual vectors, "none" their span alone (`vectors`).
        phase: "sigma", "max" or "reference": see `extraction.align`. The last needs `reference`.
        method: "optimize" always optimises; "svd" and "lowrank" are `torch.linalg.svd` and
            `torch.svd_lowrank`; "auto" takes the one that is best here, which the result tells in `advice`.
        lam: weight of the penalty, or "balance": both gradients of one size, looked at every 100 steps.
        sigma: "rayleigh", `|diag(U^H H V)|`; "norms", `|f_k| |g_k|`: refused where hard orthonormality of
            both factors ("qr") leaves nothing in the norms; under a penalty its bias is undone.
        trim: instead of a rank: starts from 64 columns, or `rank`, and cuts the tail of singular values below
            this share of the largest, in (0, 1); `spectrum` holds all.
        reference: a previous result, or a pair U, V, for phase="reference".
        init: a previous result, or a pair U, V, to start from: for a slowly changing matrix.
        lr: learning rate of Adam; given, it trains a table by Adam too.
        max_steps: 200, or 3000 of Adam.
        tol: relative step below which it ends: 1e-3 in single, 1e-6 in double precision. Of Adam: change of
            the mean loss between epochs of 100 steps, 1e-5.
        seed: of the start, of minibatches and of "lowrank"; 0 where it is not given. The same seed gives the
            same bits.
        progress: show a bar (tqdm).
        shape, dtype: of a callable or operator that has no such attributes.
        batch: rows and columns of a minibatch for Adam, a number or a pair: only `H[rows][:, columns]` is
            touched. The whole matrix in memory, else 1024.
        hidden: width of the MLP.
        checkpoint: file that is replaced every `checkpoint_every` steps, whole or not at all.
        resume: go on from it: to the same bits as without an interruption, at as many threads and processes.

    A matrix that is not in memory is read strip by strip. Under a launcher such as torchrun every process
    reads its share of the rows and all return the same.

    A singular vector is defined where its singular value is apart from the others. Of equal ones the vectors
    span the right space; of zeros they are an orthonormal completion with S = 0.

    Raises:
        TypeError, ValueError: for an argument of another type, shape, dtype or value, naming it; for NaN or
            Inf in H.
        FloatingPointError: if training diverges.
    """
    one_of("net", net, NETS), one_of("orth", orth, ORTHS), one_of("nesting", nesting, NESTINGS)
    one_of("phase", phase, PHASES), one_of("method", method, METHODS), one_of("sigma", sigma, SIGMAS)
    source: MatrixSource | None = None
    if isinstance(H, Tensor) and H.ndim != 2:
        if H.ndim < 2 or 0 in H.shape[-2:]:
            raise ValueError(f"H must be (..., M, N) without an empty side, got {tuple(H.shape)}")
        if H.dtype not in DTYPES:
            raise TypeError(f"H must be float32, float64, complex64 or complex128, got {H.dtype}")
        full = tuple(H.shape)
        dtype = H.dtype
    else:
        source = open_matrix(H, shape, dtype)
        full, dtype = source.shape, source.dtype
    tensor = H.detach() if isinstance(H, Tensor) else None
    small = min(full[-2:])
    chosen = _rank(rank, small)
    if energy is not None and (chosen is not None or trim is not None):
        raise ValueError("energy chooses the rank: give neither rank nor trim with it")
    energy = None if energy is None else _share("energy", energy)
    trim = None if trim is None else _share("trim", trim)
    if isinstance(lam, str):
        one_of("lam", lam, ("balance",))
    elif number("lam", lam) < 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    if (phase == "reference") != (reference is not None):
        raise ValueError('phase="reference" and reference go together: one of them is missing')
    if source is None and (energy is not None or trim is not None):
        raise ValueError("a batch has one rank: energy and trim are for one matrix")
    double = dtype in (torch.float64, torch.complex128)
    adam = net == "mlp" or orth != "bjorck" or lr is not None
    if sigma == "norms" and orth == "qr":
        raise ValueError('sigma="norms" finds nothing after orth="qr": orthonormal columns have norm 1')
    if source is None and adam and method == "optimize":
        raise ValueError('a batch is optimised as tables: net must be "table", orth "bjorck" and lr None')
    if checkpoint is not None and source is None:
        raise ValueError("checkpoint is for one matrix, not for a batch")
    if tol is None:
        tol = 1e-5 if adam else 1e-6 if double else 1e-3
    wish = _Wish(
        nesting,
        phase,
        sigma,
        None if reference is None else _pair("reference", reference, full, dtype),
        positive("tol", tol),
        None if max_steps is None else integer("max_steps", max_steps, 0),
        0 if seed is None else integer("seed", seed, 0),
        bool(progress),
        None if checkpoint is None else Path(checkpoint),
        bool(resume),
        integer("checkpoint_every", checkpoint_every, 1),
    )
    if lr is not None:
        positive("lr", lr)
    largest = None if tensor is None else _largest(tensor)
    begin = chosen if chosen is not None else min(START, small) if trim is not None else small
    matrices = None if source is not None else int(torch.tensor(full[:-2]).prod())
    asked = FIRST if energy is not None else begin
    advice = advise(full[-2], full[-1], min(asked, small), matrices=matrices, in_memory=tensor is not None)
    # there is nothing to optimise in a batch of no matrices
    taken = "svd" if matrices == 0 else advice.method if method == "auto" else method
    if wish.checkpoint is not None and method == "auto":
        taken = "optimize"
    if taken != "optimize" and tensor is None:
        raise ValueError(f'method="{taken}" needs the matrix in memory; "optimize" does not')
    held: Held | Streamed
    if tensor is not None:
        assert largest is not None
        # sums of squares neither overflow nor vanish, whatever the unit of H
        size = torch.where(largest > 0, largest, torch.ones_like(largest))[..., None, None]
        tensor = _divided(tensor.resolve_conj().resolve_neg(), size)
        held = Held(tensor)
        source = None if source is None else open_matrix(tensor)
    else:
        assert source is not None
        size = torch.ones((1, 1), dtype=torch.float64)
        held = Streamed(source)
    run = _Run(held, source, full, dtype, wish, advice)
    first = None if init is None else _pair("init", init, full, dtype)
    extra = init.extra if isinstance(init, NeuralSVDResult) else None
    if taken != "optimize":
        assert tensor is not None
        found = run.direct(tensor, small if energy is not None else begin, taken)
    elif adam:
        assert source is not None
        found = run.trained(
            begin, net, orth, lam, lr, _batch(batch, source), integer("hidden", hidden, 1), first, energy
        )
    else:
        found = run.descended(begin, energy, first, extra)
    return run.finish(found, energy, trim, size)


def _batch(batch: Any, source: MatrixSource) -> tuple[int, int]:
    if batch is None:
        whole = source.tensor is not None
        return source.shape if whole else (min(BLOCK, source.shape[0]), min(BLOCK, source.shape[1]))
    both = batch if isinstance(batch, Sequence) else (batch, batch)
    if len(both) != 2:
        raise ValueError(f"batch must be a number or a pair of rows and columns, got {batch!r}")
    rows, columns = (integer("batch", n, 2) for n in both)
    return rows, columns


@dataclass
class _Found:
    U: Tensor
    S: Tensor
    V: Tensor
    W: Tensor  # H V
    method: str
    vectors: str
    steps: int
    converged: bool
    history: dict[str, list[float]]
    keep: int  # columns that were asked for


class _Run:
    def __init__(
        self,
        held: Held | Streamed,
        source: MatrixSource | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wish: _Wish,
        advice: Advice,
    ) -> None:
        self.held, self.source, self.shape, self.dtype = held, source, shape, dtype
        self.wish, self.advice = wish, advice
        device = held.H.device if isinstance(held, Held) else torch.device("cpu")
        self.like = torch.empty((), dtype=dtype, device=device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.wish.seed)

    def direct(self, H: Tensor, rank: int, method: str) -> _Found:
        U, S, V = _direct(H, rank, method, self.wish)
        U, _, V = align(U, V, S.to(U.dtype), self.wish.phase, self.wish.reference)
        return _Found(U, S, V, H @ V, method, INDIVIDUAL, 0, True, {}, rank)

    def descended(
        self, begin: int, energy: float | None, init: tuple[Tensor, Tensor] | None, extra: Tensor | None
    ) -> _Found:
        wish, small, N = self.wish, min(self.shape[-2:]), self.shape[-1]
        guard = 0 if wish.nesting == "none" else GUARD
        keep = min(FIRST, small) if energy is not None else begin
        given = None if init is None else init[1]
        if given is not None and extra is not None:
            given = torch.cat([given, extra.to(self.dtype)], -1)
        steps = STEPS if wish.max_steps is None else wish.max_steps
        facts = {"shape": list(self.shape), "columns": min(keep + guard, small), "nesting": wish.nesting}
        files = _Checkpoints(wish, facts | {"seed": wish.seed, "dtype": str(self.dtype)})
        state: State | None = None
        if files.found is not None:
            state = State(files.found["F"], files.found["step"], files.found["history"])
            keep = int(files.found["keep"])
        bar = _Bar(steps, wish.progress)
        together = isinstance(self.held, Held) and len(self.shape) > 2 and wish.nesting != "none"
        while True:
            L = min(keep + guard, small)
            F = start(self.like, self.shape[:-2], N, L, self._generator(), given)

            def after(state: State, change: float, keep: int = keep) -> None:
                bar(state.step, f"change {change:.1e}")
                files.write(state.step, {**state._asdict(), "keep": keep})

            found = descend(
                self.held,
                F,
                keep,
                wish.nesting,
                tol=wish.tol,
                max_steps=steps,
                state=state,
                after=after,
                together=together,
            )
            if energy is None or keep == small:
                break
            share = torch.linalg.vector_norm(found.G, dim=-2).square().sort(descending=True).values[:keep]
            assert self.held.square is not None
            if float(share.sum()) >= energy * float(self.held.square):
                break
            keep = min(2 * keep, small)
            given, state = found.F, State(found.F, found.steps, found.history)
            state = state._replace(
                F=start(self.like, self.shape[:-2], N, min(keep + guard, small), self._generator(), given)
            )
        bar.close()
        U, S, V, W = decompose(found.F, None, self.held.product, wish.sigma, wish.phase, wish.reference)
        vectors = FREE if wish.nesting == "none" else INDIVIDUAL
        return _Found(U, S, V, W, "optimize", vectors, found.steps, found.converged, found.history, keep)

    def trained(
        self,
        begin: int,
        net: str,
        orth: str,
        lam: float | str,
        lr: float | None,
        batch: tuple[int, int],
        hidden: int,
        init: tuple[Tensor, Tensor] | None,
        energy: float | None,
    ) -> _Found:
        assert self.source is not None
        wish, small = self.wish, min(self.shape)
        keep = min(START, small) if energy is not None else begin
        model = NeuralSVD(
            self.shape[0],
            self.shape[1],
            keep,
            dtype=self.dtype,
            net=net,
            orth=orth,
            nesting=wish.nesting,
            lam=1.0 if isinstance(lam, str) else lam,
            hidden=hidden,
            generator=self._generator(),
        )
        if init is not None:
            if init[0].shape[-1] < keep:
                raise ValueError(f"init must have at least {keep} columns, got {init[0].shape[-1]}")
            model.start_from(init[0][:, :keep], init[1][:, :keep])
        steps = FIT_STEPS if wish.max_steps is None else wish.max_steps
        facts = {"shape": list(self.shape), "columns": keep, "nesting": wish.nesting, "net": net}
        files = _Checkpoints(wish, facts | {"orth": orth, "seed": wish.seed, "dtype": str(self.dtype)})
        bar = _Bar(steps, wish.progress)
        scale = self._scale()

        def after(state: dict[str, Any], loss: float) -> None:
            bar(state["step"], f"loss {loss:.3g}")
            files.write(state["step"], state)

        history, count, converged = fit(
            model,
            self.source,
            scale,
            balance=isinstance(lam, str),
            lr=lr,
            steps=steps,
            tol=wish.tol,
            batch=batch,
            seed=wish.seed,
            state=files.found,
            after=after,
        )
        bar.close()
        F, G = model.factors()
        U, S, V, W = decompose(F, G, self.held.product, wish.sigma, wish.phase, wish.reference)
        if wish.sigma == "norms":
            if orth == "penalty":
                # at the minimum |f_k|^2 = |g_k|^2 = (sigma_k + 2 lam) / (1 + 2 lam)
                weight = 2 * model.lam * self._penalty_weight(keep)
                S = (S * (1 + weight) - weight).clamp_min(0)
            S = S * scale
        vectors = FREE if wish.nesting == "none" else INDIVIDUAL
        return _Found(U, S, V, W, "optimize", vectors, count, converged, history, keep)

    def _penalty_weight(self, L: int) -> Tensor:
        """The penalty against the weight of each column's terms in the objective."""
        ones = torch.ones(L, dtype=self.like.real.dtype if self.dtype.is_complex else self.dtype)
        if self.wish.nesting != "joint":
            return ones
        return L / (L - torch.arange(L)).to(ones.dtype)

    def _scale(self) -> float:
        """About the largest singular value, by which H is divided for Adam."""
        assert self.source is not None
        rows, columns = (min(BLOCK // 2, n) for n in self.shape)
        X = self.source.block(slice(0, rows), slice(0, columns))
        _finite(X)
        x = torch.ones(columns, 1, dtype=X.dtype)
        for _ in range(16):
            y = X.mH @ (X @ x)
            size = torch.linalg.vector_norm(y)
            if float(size) == 0:
                return 1.0
            x = y / size
        sampled = self.shape[0] * self.shape[1] / (rows * columns)
        return float(torch.linalg.vector_norm(X @ x)) * sampled**0.5

    def finish(
        self, found: _Found, energy: float | None, trim: float | None, size: Tensor
    ) -> NeuralSVDResult:
        held, spectrum = self.held, found.S
        keep = found.keep
        if energy is not None:
            total = held.square if held.square is not None else found.S.square().sum()
            shares = found.S[..., : found.keep].double().square().cumsum(-1) / total.clamp_min(1e-300)
            keep = min(int((shares < energy).sum()) + 1, found.keep)
        elif trim is not None:
            keep = max(1, int((found.S[:keep] >= trim * found.S[0]).sum()))
            spectrum = found.S[: found.keep]
        U, V, W = (x[..., :keep] for x in (found.U, found.V, found.W))
        S = found.S[..., :keep]
        if held.square is None:
            held.square = torch.linalg.vector_norm(found.S, dtype=torch.float64).square()
        rel, span, ortho = _measured(held, U, S, V, W)
        real = S.dtype
        factor = size[..., 0].to(S.device, real)
        extra = found.V[..., keep:] if found.method == "optimize" and found.V.shape[-1] > keep else None
        return NeuralSVDResult(
            U.contiguous(),
            (S * factor.reshape((*factor.shape[:-1], 1)) if S.ndim > 1 else S * factor.reshape(())),
            V.contiguous(),
            rel,
            ortho,
            span,
            found.vectors,
            found.method,
            self.advice.reason,
            found.steps,
            found.converged,
            found.history,
            spectrum * factor if S.ndim > 1 else spectrum * factor.reshape(()),
            extra,
        )
