"""The factors F and G of one matrix as trainable modules, and what the second document trains them by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lomacs_fast import functional
from lomacs_fast.reference.arguments import integer, number
from lomacs_fast.reference.ortho import gram_residual

from .extraction import decompose, orthonormalize

__all__ = ["NESTINGS", "NETS", "ORTHS", "FactorMLP", "FactorTable", "NeuralSVD"]

NETS = ("table", "mlp")
ORTHS = ("bjorck", "penalty", "qr")
NESTINGS = ("none", "joint", "sequential")
BJORCK = 6, 2  # steps and order by which F is orthonormal in training


def one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return str(value)


class FactorTable(nn.Module):
    """Columns as parameters: `forward(index)` gives rows `index` of `weight / sqrt(n)`, `(n, L)`."""

    def __init__(self, n: int, L: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.n, self.L = n, L
        self.weight = nn.Parameter(torch.randn(n, L, dtype=dtype, generator=generator))

    def forward(self, index: Tensor | slice = slice(None)) -> Tensor:
        return self.weight[index] / math.sqrt(self.n)

    @torch.no_grad()
    def fit_to_table(self, target: Tensor) -> float:
        """Take the target as it is; returns the relative error, 0."""
        self.weight.copy_(target * math.sqrt(self.n))
        return 0.0


class FactorMLP(nn.Module):
    """`MLP(one_hot(i))` with one hidden layer, without a one-hot vector.

    The first layer's product with `one_hot(i)` is row i of its transposed weight: `forward(index)` is
    `(relu(embedding[index] + bias) W + c) / sqrt(n)`, `(len(index), L)`; a complex dtype has 2L outputs, the
    real parts first.
    """

    def __init__(
        self, n: int, L: int, dtype: torch.dtype, hidden: int = 128, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.n, self.L, self.complex = n, L, dtype.is_complex
        real = dtype.to_real()
        outputs = L * (2 if self.complex else 1)
        scale = math.sqrt((1 if self.complex else 2) / hidden)
        self.embedding = nn.Parameter(torch.randn(n, hidden, dtype=real, generator=generator))
        self.bias = nn.Parameter(torch.zeros(hidden, dtype=real))
        self.weight = nn.Parameter(torch.randn(hidden, outputs, dtype=real, generator=generator) * scale)
        self.offset = nn.Parameter(torch.zeros(outputs, dtype=real))

    def forward(self, index: Tensor | slice = slice(None)) -> Tensor:
        x = torch.relu(self.embedding[index] + self.bias) @ self.weight + self.offset
        x = x / math.sqrt(self.n)
        return torch.complex(x[:, : self.L], x[:, self.L :]) if self.complex else x

    def fit_to_table(self, target: Tensor, steps: int = 40) -> float:
        """Regress the network onto a table `(n, L)` by L-BFGS; returns `|forward() - target| / |target|`."""
        target = target.detach()
        square = torch.linalg.vector_norm(target).square().clamp_min(torch.finfo(target.dtype).tiny)
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.linalg.vector_norm(self() - target).square() / square
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            return float((torch.linalg.vector_norm(self() - target).square() / square).sqrt())


class NeuralSVD(nn.Module):
    """F `(N, L)` and G `(M, L)` of one matrix by two networks, with the loss that trains them.

    For those who train it themselves; `neural_svd` does it for you:

        >>> import torch
        >>> from lomacs_fast import NeuralSVD
        >>> H = torch.randn(24, 16, dtype=torch.complex64)
        >>> net = NeuralSVD(24, 16, rank=4, net="mlp", orth="penalty")
        >>> optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        >>> for step in range(100):
        ...     rows, columns = torch.randint(24, (12,)), torch.randint(16, (12,))
        ...     loss, terms = net.loss(H[rows][:, columns], rows, columns)
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> U, S, V = net.extract(H)
        >>> U.shape, S.shape, V.shape
        (torch.Size([24, 4]), torch.Size([4]), torch.Size([16, 4]))

    Args:
        M, N: rows and columns of the matrix.
        rank: L, at most min(M, N).
        dtype: of the matrix: float32, float64, complex64 or complex128.
        net: "mlp" (one hidden layer over an embedding row) or "table" (the entries themselves).
        orth: "bjorck": F passes through Björck's iteration, G stays free and carries the singular values;
            "penalty": the loss gains `lam (|F^H F - I|^2 + |G^H G - I|^2)`; "qr": nothing in the loss, call
            `project()` at the ends of epochs.
        nesting: "none", "joint" or "sequential", as `functional.low_rank_loss`.
        lam: weight of the penalty; may be assigned later.
        hidden: width of the MLP.
        generator: of the first values.

    Source: the objective of Ryu et al., ICML 2024, on a matrix whose rows and columns are the samples.
    """

    def __init__(
        self,
        M: int,
        N: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.complex64,
        net: str = "mlp",
        orth: str = "penalty",
        nesting: str = "joint",
        lam: float = 1.0,
        hidden: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.M, self.N = integer("M", M, 1), integer("N", N, 1)
        self.rank = integer("rank", rank, 1)
        if self.rank > min(M, N):
            raise ValueError(f"rank must be at most min(M, N) = {min(M, N)}, got {rank}")
        self.net, self.orth = one_of("net", net, NETS), one_of("orth", orth, ORTHS)
        self.nesting = one_of("nesting", nesting, NESTINGS)
        self.lam = number("lam", lam)
        hidden = integer("hidden", hidden, 1)

        def factor(n: int) -> FactorTable | FactorMLP:
            if self.net == "table":
                return FactorTable(n, self.rank, dtype, generator)
            return FactorMLP(n, self.rank, dtype, hidden, generator)

        self.f_net, self.g_net = factor(self.N), factor(self.M)

    def forward(self, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Any:
        """Rows `columns` of F and rows `rows` of G: `(len(columns), L)` and `(len(rows), L)`."""
        if self.orth == "bjorck":
            # the iteration mixes all rows of F
            return functional.bjorck(self.f_net(), *BJORCK)[columns], self.g_net(rows)
        return self.f_net(columns), self.g_net(rows)

    def _penalty(self, X: Tensor, Y: Tensor, n: int) -> Tensor:
        """`|X^H X - I|^2` of n rows; from two independent samples of them, X and Y, without bias."""
        first, second = (gram_residual(x * math.sqrt(n / len(x))) for x in (X, Y))
        return (first.conj() * second).real.sum() if X.is_complex() else (first * second).sum()

    def terms(
        self, H: Tensor, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The low-rank objective and the penalty, unweighted; arguments as `loss`."""
        F, G = self(rows, columns)
        whole = len(G) == self.M and len(F) == self.N
        shape = None if whole else (self.M, self.N)
        main = functional.low_rank_loss(F, G, H, self.nesting, shape=shape)
        if self.orth != "penalty":
            return main, main.new_zeros(())
        half = [x[: len(x) // 2] if len(x) < n else x for x, n in ((F, self.N), (G, self.M))]
        rest = [x[len(x) // 2 :] if len(x) < n else x for x, n in ((F, self.N), (G, self.M))]
        # one half of the sample against the other: the square of one sample's Gram matrix would be biased
        pairs = zip(half, rest, (self.N, self.M), strict=True)
        return main, sum((self._penalty(x, y, n) for x, y, n in pairs), start=main.new_zeros(()))

    def loss(
        self, H: Tensor, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss `main + lam * orth` and its terms, detached.

        H is the block of the matrix at the crossings of rows and columns, two vectors of at least 2 indices
        drawn uniformly and independently of each other (the whole matrix without them). All pairs of the
        block count; every term is an unbiased estimate of that of the whole matrix.
        """
        main, orth = self.terms(H, rows, columns)
        return main + self.lam * orth, {"main": main.detach(), "orth": orth.detach()}

    def balance(self, H: Tensor, rows: Any = slice(None), columns: Any = slice(None)) -> float:
        """Set `lam` so that the gradients of both terms, in the parameters, are of one size; returns it."""
        norms = []
        for term in self.terms(H, rows, columns):
            # the factors are in both graphs
            found = torch.autograd.grad(term, list(self.parameters()), allow_unused=True, retain_graph=True)
            squares = [torch.linalg.vector_norm(g).square() for g in found if g is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))
        # near orthonormal columns the second gradient vanishes, and no weight makes it large
        self.lam = min(max(norms[0] / max(norms[1], 1e-12), 1e-3), 1e3)
        return self.lam

    @torch.no_grad()
    def project(self) -> tuple[float, float]:
        """Orthonormal columns by QR, and both networks regressed onto them; returns the relative errors."""
        errors = []
        for net in (self.f_net, self.g_net):
            Q, R = torch.linalg.qr(net())
            Q = Q * torch.sgn(R.diagonal())
            errors.append(net.fit_to_table(Q))
        return errors[0], errors[1]

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """All of F and G."""
        F, G = self()
        return F, G

    @torch.no_grad()
    def extract(
        self, H: Tensor, sigma: str = "rayleigh", phase: str = "sigma"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U `(M, L)`, S `(L,)`, V `(N, L)` of the factors as they are, S largest first."""
        F, G = self.factors()
        U, S, V, _ = decompose(F, G, lambda V: H @ V, sigma, phase)
        return U, S, V

    def start_from(self, U: Tensor, V: Tensor) -> None:
        """Take the columns of a previous U and V for F and G."""
        self.f_net.fit_to_table(orthonormalize(V))
        self.g_net.fit_to_table(orthonormalize(U))
