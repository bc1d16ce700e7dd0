"""What holds for every public function: gradients, precisions, views, empty batches, one graph, refusals."""

import inspect
import re

import pytest
import torch

from lomacs_fast import functional, use_backend


class Maker:
    """Random arguments of one size; single precision holds the rounded values of double precision."""

    def __init__(self, B=3, M=6, N=5, r=3, dtype=torch.float64, seed=0):
        self.B, self.M, self.N, self.r, self.dtype = B, M, N, r, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, *shape):
        x = torch.randn(shape, dtype=torch.float64, generator=self.generator) / max(shape, default=1) ** 0.5
        return x.to(self.dtype)

    def complex(self, *shape):
        return torch.complex(self.real(*shape), self.real(*shape))

    def scalar(self, value):
        return torch.tensor(value, dtype=self.dtype)

    def gate(self):
        h, M, N = 4, self.M, self.N
        weights = {"row_w1": (h, M), "row_w2": (M, h), "col_w1": (h, N), "col_w2": (N, h)}
        return {name: self.real(*shape) for name, shape in weights.items()} | {"temperature": 0.7}

    def factors(self, of):
        B, M, N, r = self.B, self.M, self.N, self.r
        return {"U": of(B, M, r), "V": of(B, N, r), "H": of(B, M, N)}

    def weights(self):
        values = {"lam": 0.3, "w_energy": 0.4, "w_diag": 0.2, "w_match": 0.6}
        return {name: self.scalar(value) for name, value in values.items()}

    def attention(self):
        T, G, g, a, k = self.M, 2, 3, 2, 4
        shapes = {"wq": (G, a, g), "wk": (G, a, g), "wv": (G, g, g), "wo": (G, g, g)}
        shapes |= {"x": (self.B, T, G * g), "pk": (G, T, k), "pv": (G, T, k)}
        return {name: self.real(*shape) for name, shape in shapes.items()}

    def conv(self):
        d, k = 4, 3
        shapes = {"dw_weight": (2 * d, 1, k), "dw_bias": (2 * d,), "pw_weight": (d, d, 1), "pw_bias": (d,)}
        return {"x": self.real(self.B, self.M, d)} | {n: self.real(*s) for n, s in shapes.items()}

    def norm(self, block):
        d = block["x"].shape[-1]
        return block | {"norm_weight": self.real(d), "norm_bias": self.real(d)}

    def dual(self):
        d = 4
        weights = {"weight": (d, 4 * self.N), "bias": (d,), "pos": (1, self.M, d)}
        return {"Hd": self.complex(self.B, self.M, self.N)} | {n: self.real(*s) for n, s in weights.items()}

    def front(self):
        dual = self.dual()
        return {"H": dual.pop("Hd")} | self.gate() | dual

    def heads(self):
        d, sizes = 5, {"u": 2 * self.M * self.r, "v": 2 * self.N * self.r}
        shapes = {f"{n}_weight": (size, d) for n, size in sizes.items()} | {
            f"{n}_bias": (size,) for n, size in sizes.items()
        }
        return {"feat": self.real(self.B, d)} | {name: self.real(*shape) for name, shape in shapes.items()}

    def low_rank(self, of):
        factors = self.factors(of)
        return {"F": factors["V"], "G": factors["U"], "H": factors["H"]}


def tall(m, of):
    return {"U": of(m.B, m.M, m.r)}


def spectrum(m):
    return m.real(m.B, m.r).abs()


def pair(m, of):
    factors = m.factors(of)
    return {"U": factors["U"], "V": factors["V"], "a": m.scalar(0.3), "b": m.scalar(0.2)}


def tail(m, of):
    factors = m.factors(of)
    raw = {"U_raw": factors["U"], "V_raw": factors["V"], "S_pred": spectrum(m), "H": factors["H"]}
    return raw | {"a": m.scalar(0.3), "b": m.scalar(0.2), "tau": m.scalar(0.4)}


CASES = {
    "spectral_gate": lambda m: {"Hf": m.complex(m.B, m.M, m.N)} | m.gate(),
    "freq_gate": lambda m: {"H": m.complex(m.B, m.M, m.N)} | m.gate(),
    "freq_gate/normalize": lambda m: {"H": m.complex(m.B, m.M, m.N)} | m.gate() | {"normalize": True},
    "dual_view_project": Maker.dual,
    "gate_project": Maker.front,
    "gate_project/normalize": lambda m: m.front() | {"normalize": True},
    "projected_attention": Maker.attention,
    "projected_attention/norm": lambda m: m.norm(m.attention()),
    "gated_conv1d": Maker.conv,
    "gated_conv1d/norm": lambda m: m.norm(m.conv()),
    "column_normalize": lambda m: tall(m, m.complex),
    "column_normalize/real": lambda m: tall(m, m.real),
    "ortho_refine": lambda m: tall(m, m.complex) | {"step": m.scalar(0.3)},
    "ortho_refine/real": lambda m: tall(m, m.real) | {"step": m.scalar(0.3)},
    "ortho_refine_pair": lambda m: pair(m, m.complex),
    "ortho_refine_pair/real": lambda m: pair(m, m.real),
    "bjorck": lambda m: tall(m, m.complex) | {"steps": 2},
    "bjorck/order 2": lambda m: tall(m, m.complex) | {"steps": 2, "order": 2},
    "bjorck/real": lambda m: tall(m, m.real) | {"steps": 2},
    "spectral_calibrate": lambda m: m.factors(m.complex) | {"S_pred": spectrum(m), "tau": m.scalar(0.4)},
    "spectral_calibrate/real": lambda m: m.factors(m.real) | {"S_pred": spectrum(m), "tau": m.scalar(0.4)},
    "svd_heads": Maker.heads,
    "svd_tail": lambda m: tail(m, m.complex),
    "svd_tail/real": lambda m: tail(m, m.real),
    "aeplus_loss": lambda m: m.factors(m.complex) | {"S": spectrum(m)} | m.weights(),
    "aeplus_loss/mean": lambda m: m.factors(m.complex) | {"S": spectrum(m), "match": "mean"} | m.weights(),
    "aeplus_loss/real": lambda m: m.factors(m.real) | {"S": spectrum(m)} | m.weights(),
    "low_rank_loss": lambda m: m.low_rank(m.complex),
    "low_rank_loss/joint": lambda m: m.low_rank(m.complex) | {"nesting": "joint"},
    "low_rank_loss/sequential": lambda m: m.low_rank(m.complex) | {"nesting": "sequential"},
    "low_rank_loss/block": lambda m: m.low_rank(m.real) | {"nesting": "joint", "shape": (20, 90)},
}
FUNCTIONS = [name for name in CASES if "/" not in name]


def arguments(case, **kwargs):
    return CASES[case](Maker(**kwargs))


def function(case):
    return getattr(functional, case.split("/")[0])


def flat(result):
    """All outputs; of a loss the value, then its terms."""
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result) if isinstance(result[1], torch.Tensor) else [result[0], *result[1]]


def project(out):
    """A fixed random linear form of an output, to differentiate."""
    double = torch.promote_types(out.dtype, torch.float64)
    w = torch.randn(out.shape, dtype=double, generator=torch.Generator().manual_seed(9))
    return (out * w.to(out.dtype)).real.sum()


def split(kwargs):
    """Function of the tensors alone, and the tensors."""
    names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]

    def over(fn):
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return lambda *tensors: fn(**dict(zip(names, tensors, strict=True)), **rest)

    return over, [kwargs[name] for name in names]


def differentiable(outputs):
    return [x for x in outputs if x.requires_grad]


def run(case, kwargs):
    """Outputs and the gradients of all tensors."""
    over, tensors = split(kwargs)
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in tensors]
    outputs = flat(over(function(case))(*inputs))
    return outputs, torch.autograd.grad(sum(map(project, differentiable(outputs))), inputs)


def relative(x, y):
    return (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp_min(1e-300)).item()


def test_every_public_function_is_covered():
    public = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
    # these start from factors of their own making: tests/test_refine.py, tests/test_neural_svd.py; the
    # backbone takes rows of blocks: tests/test_ops_backbone.py
    assert sorted({*public} - {"refine_svd", "neural_svd_steps", "backbone"}) == sorted(FUNCTIONS)
    for name in public:
        assert "Raises:" in getattr(functional, name).__doc__


@pytest.mark.parametrize("case", [case for case in CASES if "sequential" not in case])
def test_gradients(case):
    over, tensors = split(arguments(case, B=2, M=4, N=3, r=2))
    inputs = [x.requires_grad_() for x in tensors]
    fn = over(function(case))
    assert torch.autograd.gradcheck(lambda *x: tuple(differentiable(flat(fn(*x)))), inputs)
    # the fused op refuses second derivatives, see test_ops_aeplus.py
    with use_backend("eager"):
        assert torch.autograd.gradgradcheck(
            lambda *x: tuple(differentiable(flat(fn(*x)))), inputs, fast_mode=True
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(16, 12, 5), (11, 63, 11)])
def test_single_precision_agrees_with_double(case, size):
    M, N, r = size
    kwargs = arguments(case, B=8, M=M, N=N, r=min(r, M, N), dtype=torch.float32)
    exact = {
        name: x.to(torch.promote_types(x.dtype, torch.float64)) if isinstance(x, torch.Tensor) else x
        for name, x in kwargs.items()
    }
    outputs, gradients = run(case, kwargs)
    exact_outputs, exact_gradients = run(case, exact)
    eps = torch.finfo(torch.float32).eps
    for x, y in zip([*outputs, *gradients], [*exact_outputs, *exact_gradients], strict=True):
        assert x.is_complex() == y.is_complex()
        assert x.dtype in (torch.float32, torch.complex64)
        assert y.dtype in (torch.float64, torch.complex128)
        assert relative(x, y) < 30 * eps


@pytest.mark.parametrize("case", CASES)
def test_empty_batch(case):
    full, _ = run(case, arguments(case))
    kwargs = arguments(case, B=0)
    outputs, gradients = run(case, kwargs)
    for x, y in zip(outputs, full, strict=True):
        assert x.shape == (y.shape if y.ndim == 0 else (0, *y.shape[1:]))
        assert x.dtype == y.dtype
    for x, gradient in zip(split(kwargs)[1], gradients, strict=True):
        assert gradient.shape == x.shape


def conjugated(x):
    return x.conj().resolve_conj().conj() if x.is_complex() else x


def negated(x):
    return torch._neg_view(-x) if x.is_complex() else torch.complex(torch.zeros_like(x), -x).conj().imag


def strided(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2] if x.ndim else x


def transposed(x):
    return x.mT.clone(memory_format=torch.contiguous_format).mT if x.ndim > 1 else x


def expanded(x):
    return x[..., :1, :].expand(x.shape) if x.ndim > 1 else x


@pytest.mark.parametrize("view", [conjugated, negated, strided, transposed, expanded])
@pytest.mark.parametrize("case", CASES)
def test_views_equal_their_contiguous_copies(case, view):
    kwargs = arguments(case)
    if view is expanded and case.startswith("bjorck"):
        kwargs["U"] = kwargs["U"] / 2
    views, copies = dict(kwargs), dict(kwargs)
    for name, x in kwargs.items():
        if isinstance(x, torch.Tensor):
            views[name] = view(x.requires_grad_())
            copies[name] = torch.empty(x.shape, dtype=x.dtype).copy_(views[name].detach())
    assert any(
        x.is_conj() or x.is_neg() or not x.is_contiguous()
        for x in views.values()
        if isinstance(x, torch.Tensor)
    ) or (view is conjugated and not any(torch.is_complex(x) for x in split(kwargs)[1]))
    (outputs, gradients), (expected, expected_gradients) = run(case, views), run(case, copies)
    for x, y in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(x.resolve_conj(), y.resolve_conj(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_inputs_stay_and_bits_repeat(case):
    kwargs = arguments(case, B=5, M=17, N=12, r=4, dtype=torch.float32)
    before = {name: x.clone() for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    (first, first_gradients), (again, again_gradients) = run(case, kwargs), run(case, kwargs)
    for x, y in zip([*first, *first_gradients], [*again, *again_gradients], strict=True):
        assert torch.equal(x, y)
    for name, x in before.items():
        assert torch.equal(x, kwargs[name]), name


@pytest.mark.parametrize("case", CASES)
def test_compiled_in_one_graph(case):
    kwargs = arguments(case)
    over, tensors = split(kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(over(function(case)), fullgraph=True, backend="aot_eager")
    inputs = [x.detach().requires_grad_() for x in tensors]
    outputs = flat(compiled(*inputs))
    gradients = torch.autograd.grad(sum(map(project, differentiable(outputs))), inputs)
    for x, y in zip([*outputs, *gradients], [y for part in run(case, kwargs) for y in part], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


TENSORS = [
    (name, argument)
    for name in FUNCTIONS
    for argument, value in arguments(name).items()
    if isinstance(value, torch.Tensor) and value.ndim
]
SCALARS = [
    (name, argument)
    for name in FUNCTIONS
    for argument, value in arguments(name).items()
    if isinstance(value, torch.Tensor) and not value.ndim
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_what_is_no_floating_tensor_is_refused(name, argument):
    kwargs = arguments(name)
    for value, words in [
        (3, "int"),
        (None, "NoneType"),
        (kwargs[argument].real.numpy(), "ndarray"),
        (torch.ones(kwargs[argument].shape, dtype=torch.int64), "int64"),
        (torch.tensor(1.0, dtype=kwargs[argument].dtype), "()"),
    ]:
        with pytest.raises(
            (TypeError, ValueError), match=rf"^{argument}\b.*must .*, got .*{re.escape(words)}$"
        ):
            function(name)(**kwargs | {argument: value})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_mixed_precision_is_refused(name, argument):
    kwargs = arguments(name)
    narrow = kwargs[argument].to(torch.complex64 if kwargs[argument].is_complex() else torch.float32)
    if len(split(kwargs)[1]) == 1 or (name, argument) == ("ortho_refine", "U"):
        assert function(name)(**kwargs | {argument: narrow}).dtype == narrow.dtype
        return
    with pytest.raises(TypeError, match=r"^\w+ must be \w+ to go with \w+, got \w+$"):
        function(name)(**kwargs | {argument: narrow})


@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_scalars(name, argument):
    kwargs = arguments(name, dtype=torch.float32)
    value = kwargs[argument].item()
    expected = flat(function(name)(**kwargs))[0]
    # a schedule value in double precision, or a plain number, changes nothing but the last bits
    for same in (torch.tensor(value, dtype=torch.float64), value):
        out = flat(function(name)(**kwargs | {argument: same}))[0]
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected)
    for bad, error, words in [
        ("x", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (1j, TypeError, "got complex"),
        (torch.tensor(1j), TypeError, "got complex64"),
        (torch.ones(2), ValueError, "got shape (2,)"),
    ]:
        with pytest.raises(error, match=rf"^{argument} must be .*{re.escape(words)}$"):
            function(name)(**kwargs | {argument: bad})


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


def czeros(*shape):
    return zeros(*shape, dtype=torch.complex128)


@pytest.mark.parametrize(
    ("case", "changes", "error", "words"),
    [
        ("spectral_gate", {"Hf": czeros(5)}, ValueError, "Hf must have shape (..., *, *), got (5,)"),
        ("spectral_gate", {"Hf": zeros(6, 5)}, TypeError, "Hf must be complex64 or complex128, got float64"),
        ("freq_gate", {"H": czeros(2, 7, 5)}, ValueError, "row_w1 must have shape (*, 7), got (4, 6)"),
        ("freq_gate", {"row_w2": zeros(6, 3)}, ValueError, "row_w2 must have shape (6, 4), got (6, 3)"),
        ("freq_gate", {"col_w1": zeros(4, 6)}, ValueError, "col_w1 must have shape (*, 5), got (4, 6)"),
        ("freq_gate", {"col_w2": zeros(4, 5)}, ValueError, "col_w2 must have shape (5, 4), got (4, 5)"),
        ("freq_gate", {"H": czeros(2, 0, 5)}, ValueError, "H must have no empty dimension but the batch"),
        ("freq_gate", {"row_w1": zeros(0, 6)}, ValueError, "row_w1 must have no empty dimension"),
        ("freq_gate", {"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ("freq_gate", {"temperature": float("nan")}, ValueError, "temperature must be positive, got nan"),
        ("freq_gate", {"temperature": "x"}, TypeError, "temperature must be a real number, got str"),
        ("dual_view_project", {"Hd": czeros(6, 5)}, ValueError, "Hd must have shape (B, *, *), got (6, 5)"),
        ("dual_view_project", {"Hd": czeros(2, 1, 5)}, ValueError, "Hd must be at least 2 x 2"),
        ("dual_view_project", {"Hd": czeros(2, 5, 1)}, ValueError, "got 5 x 1"),
        ("dual_view_project", {"weight": zeros(4, 10)}, ValueError, "weight must have shape (*, 20)"),
        ("dual_view_project", {"bias": zeros(5)}, ValueError, "bias must have shape (4,), got (5,)"),
        ("dual_view_project", {"pos": zeros(1, 5, 4)}, ValueError, "pos must have shape (1, 6, 4)"),
        ("projected_attention", {"x": zeros(2, 6, 7)}, ValueError, "divides d = 7, got 2"),
        ("projected_attention", {"x": zeros(6, 6)}, ValueError, "x must have shape (B, *, *), got (6, 6)"),
        ("projected_attention", {"wq": []}, ValueError, "wq must hold at least one group, got 0"),
        (
            "projected_attention",
            {"wq": [zeros(2, 3), zeros(1, 3)]},
            ValueError,
            "wq[1] must have shape (2, 3)",
        ),
        ("projected_attention", {"wq": zeros(2, 2, 2)}, ValueError, "wq must have shape (2, 2, 3)"),
        ("projected_attention", {"wk": [zeros(2, 3)]}, ValueError, "wk must hold 2 groups as wq does, got 1"),
        ("projected_attention", {"wk": zeros(2, 1, 3)}, ValueError, "wk must have shape (2, 2, 3)"),
        ("projected_attention", {"wv": zeros(2, 2, 3)}, ValueError, "wv must have shape (2, 3, 3)"),
        ("projected_attention", {"wo": [zeros(3, 3), 1]}, TypeError, "wo[1] must be a tensor, got int"),
        ("projected_attention", {"pk": zeros(2, 5, 4)}, ValueError, "pk must have shape (2, 6, *)"),
        ("projected_attention", {"pk": zeros(2, 6, 0)}, ValueError, "pk must have no empty dimension"),
        ("projected_attention", {"pv": zeros(2, 6, 3)}, ValueError, "pv must have shape (2, 6, 4)"),
        ("gated_conv1d", {"x": zeros(2, 6, 5)}, ValueError, "dw_weight must have shape (10, 1, *)"),
        ("gated_conv1d", {"x": zeros(2, 0, 4)}, ValueError, "x must have no empty dimension but the batch"),
        (
            "gated_conv1d",
            {"dw_weight": zeros(8, 1, 2)},
            ValueError,
            "dw_weight must have an odd number of taps",
        ),
        ("gated_conv1d", {"dw_bias": zeros(4)}, ValueError, "dw_bias must have shape (8,), got (4,)"),
        ("gated_conv1d", {"pw_weight": zeros(4, 4)}, ValueError, "pw_weight must have shape (4, 4, 1)"),
        ("gated_conv1d", {"pw_bias": zeros(8)}, ValueError, "pw_bias must have shape (4,), got (8,)"),
        ("column_normalize", {"U": zeros(4)}, ValueError, "U must have shape (..., *, *), got (4,)"),
        ("ortho_refine", {"step": 0.6}, ValueError, "step must lie in (0, 0.5], got 0.6"),
        ("ortho_refine", {"step": float("nan")}, ValueError, "step must lie in (0, 0.5], got nan"),
        ("bjorck", {"U": zeros(3, 4)}, ValueError, "at least as many rows as columns"),
        ("ortho_refine", {"U": zeros(3, 4)}, ValueError, "U must have at least as many rows as columns"),
        (
            "ortho_refine_pair",
            {"U": zeros(4, 3), "V": zeros(2, 3)},
            ValueError,
            "V must have at least as many rows as columns",
        ),
        ("bjorck", {"U": zeros(3, 0)}, ValueError, "U must have no empty dimension"),
        ("bjorck", {"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ("bjorck", {"steps": 2.0}, TypeError, "steps must be an integer, got float"),
        ("bjorck", {"steps": True}, TypeError, "steps must be an integer, got bool"),
        ("bjorck", {"order": 3}, ValueError, "order must be 1 or 2, got 3"),
        ("bjorck", {"order": 1.0}, TypeError, "order must be an integer, got float"),
        ("spectral_calibrate", {"U": czeros(3, 5, 3)}, ValueError, "U must have shape (..., 6, *)"),
        ("spectral_calibrate", {"V": czeros(3, 5, 2)}, ValueError, "V must have shape (..., 5, 3)"),
        (
            "spectral_calibrate",
            {"U": zeros(3, 6, 3)},
            TypeError,
            "U must be complex128 to go with H, got float64",
        ),
        (
            "spectral_calibrate",
            {"S_pred": zeros(3, 2)},
            ValueError,
            "S_pred must have shape (3, 3), got (3, 2)",
        ),
        ("spectral_calibrate", {"tau": 1.1}, ValueError, "tau must lie in [0, 1], got 1.1"),
        (
            "aeplus_loss",
            {"H": czeros(2, 6, 5)},
            ValueError,
            "U must have the batch of H, (2,), got shape (3, 6",
        ),
        (
            "aeplus_loss",
            {"V": czeros(5, 3)},
            ValueError,
            "V must have the batch of H, (3,), got shape (5, 3)",
        ),
        ("aeplus_loss", {"S": czeros(3, 3)}, TypeError, "S must be float32 or float64"),
        ("aeplus_loss", {"S": zeros(3)}, ValueError, "S must have shape (3, 3), got (3,)"),
        ("aeplus_loss", {"match": "max"}, ValueError, 'match must be "norm" or "mean", got \'max\''),
        ("low_rank_loss", {"F": czeros(3, 6, 3)}, ValueError, "F must have shape (..., 5, 3), got (3, 6, 3)"),
        ("low_rank_loss", {"G": czeros(6, 3)}, ValueError, "G must have the batch of H, (3,)"),
        ("low_rank_loss", {"nesting": "all"}, ValueError, 'nesting must be "none", "joint" or "sequential"'),
        ("low_rank_loss", {"shape": (6, 4)}, ValueError, "shape must be at least that of the block, (6, 5)"),
        ("low_rank_loss", {"shape": 6}, TypeError, "shape must be a pair of integers, got 6"),
        ("low_rank_loss", {"shape": (6, 5, 1)}, TypeError, "shape must be a pair of integers"),
        ("low_rank_loss", {"shape": (6, 7.5)}, TypeError, "shape must be a pair of integers"),
    ],
)
def test_refused_values(case, changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        function(case)(**arguments(case) | changes)


@pytest.mark.parametrize("name", ["projected_attention", "gated_conv1d"])
def test_autocast_mixes_precisions(name):
    kwargs = arguments(name, dtype=torch.float32)
    exact = function(name)(**kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(name)(**kwargs | {"x": kwargs["x"].bfloat16()})
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), exact) < 0.05


def test_complex_stems_ignore_autocast():
    for name in ("freq_gate", "ortho_refine", "bjorck", "spectral_calibrate", "aeplus_loss", "low_rank_loss"):
        kwargs = arguments(name, dtype=torch.float32)
        exact = flat(function(name)(**kwargs))[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(flat(function(name)(**kwargs))[0], exact), name
