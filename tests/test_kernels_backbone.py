"""The Triton kernel of the backbone, interpreted where there is no device, and compiled ahead."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from aot import SHARED, reports
from interpreted import counted

from lomacs_fast import reference
from lomacs_fast.kernels import backbone as kernels
from lomacs_fast.kernels.kinds import CONVOLUTION, FOLDED, STACKED
from lomacs_fast.reference.backbone import AttentionBlock, ConvBlock, FoldedAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def problem(B, T, G, g, a, k, taps=3, depth=2, seed=0, kind="lists"):
    """Float64 tokens, blocks and last norm at the scale of a network's; k one number, or one an attention."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(shape, dtype=torch.float64, generator=generator)

    d = G * g
    k_lens = iter(k if isinstance(k, tuple) else itertools.repeat(k))
    blocks = []
    for i in range(depth):
        norm = 1 + draw(d, scale=0.1), draw(d, scale=0.1)
        if i % 2:
            mixer = draw(2 * d, 1, taps, scale=taps**-0.5), draw(2 * d), draw(d, d, 1, scale=d**-0.5), draw(d)
            blocks.append(ConvBlock(*norm, *mixer))
            continue
        n = next(k_lens)
        wq, wk = (draw(G, a, g, scale=g**-0.5) for _ in range(2))
        wv, wo = (draw(G, g, g, scale=g**-0.5) for _ in range(2))
        pk, pv = (draw(G, T, n, scale=T**-0.5) for _ in range(2))
        if kind == "folded":
            blocks.append(FoldedAttention(*norm, wq.mT @ wk / a**0.5, wv.mT @ wo.mT, pk, pv))
        else:
            blocks.append(AttentionBlock(*norm, wq, wk, wv, wo, pk, pv))
    return draw(B, T, d), blocks, 1 + draw(d, scale=0.1), draw(d, scale=0.1)


def cast(arguments, dtype):
    x, blocks, *norm = arguments
    blocks = [type(b)(*(w.to(DEVICE, dtype) for w in b)) for b in blocks]
    return [x.to(DEVICE, dtype), blocks, *(None if n is None else n.to(DEVICE, dtype) for n in norm)]


def flat(blocks, listed):
    """Weights and kinds as the kernel takes them."""
    weights, kinds = [], []
    for block in blocks:
        if isinstance(block, ConvBlock):
            kinds.append(CONVOLUTION)
        elif isinstance(block, FoldedAttention):
            kinds.append(FOLDED)
        else:
            kinds.append(len(block.wq) if listed else STACKED)
        if kinds[-1] > 0:
            weights += [*block[:2], *(w.clone() for stack in block[2:] for w in stack)]
        else:
            weights += block
    return weights, kinds


def fused(arguments, listed=True):
    x, blocks, *norm = arguments
    return kernels.backbone(x, *flat(blocks, listed), *norm, EPS)


def held_to_the_rule(problems, dtype, listed=True):
    """Relative error against float64, pooled over problems, at most twice eager's plus 4 eps."""
    ours, theirs, size = 0.0, 0.0, 0.0
    for arguments in problems:
        low = cast(arguments, dtype)
        exact = reference.backbone(*cast(low, torch.float64), EPS)
        ours += float((fused(low, listed).double() - exact).square().sum())
        theirs += float((reference.backbone(*low, EPS).double() - exact).square().sum())
        size += float(exact.square().sum())
    bound = 2 * (theirs / size) ** 0.5 + 4 * torch.finfo(dtype).eps
    assert (ours / size) ** 0.5 <= bound, f"{(ours / size) ** 0.5:.2e} against {bound:.2e}"


SMALL = [
    (2, 64, 4, 16, 32, 32),
    (3, 63, 3, 14, 7, 11, 5, 3),
    (2, 130, 2, 9, 33, 20, 3, 2),
    (2, 1, 1, 8, 3, 1, 1, 4),
    (1, 40, 1, 64, 64, 100, 9, 2),
    (2, 17, 2, 8, 4, (5, 40), 3, 3),
    (3, 20, 3, 11, 4, 6, 3, 1),
]


@pytest.mark.parametrize(
    ("kind", "size"),
    # a device compiles each of them
    [("lists", s) for s in SMALL] + [("stacked", SMALL[1]), ("folded", SMALL[1]), ("folded", SMALL[4])],
    ids=str,
)
def test_any_size(kind, size):
    draws = -(-32 // size[0]) if DEVICE == "cuda" else 1
    drawn = [problem(*size, seed=seed, kind=kind) for seed in range(draws)]
    held_to_the_rule(drawn, torch.float32, kind == "lists")


@pytest.mark.parametrize("kind", ["lists", "folded"])
def test_as_accurate_as_eager(kind):
    held_to_the_rule(
        (problem(11, 17, 2, 16, 8, 11, seed=seed, kind=kind) for seed in range(3)), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    held_to_the_rule([problem(3, 40, 2, 16, 16, 11, depth=3)], dtype)


def test_the_last_norm_may_be_plain():
    x, blocks, *_ = problem(3, 9, 2, 8, 4, 5)
    held_to_the_rule([[x, blocks, None, None]], torch.float32)


def test_large_logits():
    x, blocks, *norm = problem(3, 20, 2, 8, 4, 6)
    held_to_the_rule([[x, [blocks[0]._replace(wq=blocks[0].wq * 1e4), *blocks[1:]], *norm]], torch.float32)


def test_constant_tokens():
    x, *rest = problem(2, 9, 2, 8, 4, 5)
    held_to_the_rule([[torch.ones_like(x) * 0.75, *rest]], torch.float32)


def test_small_tokens_meet_the_epsilon_of_every_norm():
    x, blocks, *norm = problem(3, 9, 2, 8, 4, 5, depth=3)
    small = [
        b._replace(wo=b.wo * 1e-3)
        if isinstance(b, AttentionBlock)
        else b._replace(pw_weight=b.pw_weight * 1e-3, pw_bias=b.pw_bias * 1e-3)
        for b in blocks
    ]
    held_to_the_rule([[x * 1e-3, small, *norm]], torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="loads are counted where kernels are interpreted")
@pytest.mark.parametrize("kind", ["lists", "stacked", "folded"])
def test_attention_reads_its_tokens_once(kind):
    """And the statistics of the block's norm once before it, whatever the number of groups."""
    arguments = cast(problem(2, 40, 3, 12, 7, 11, depth=1, kind=kind), torch.float32)
    found = counted(lambda: fused(arguments, kind == "lists"), arguments[0])
    for sample in range(2):
        want = torch.zeros_like(arguments[0], dtype=torch.int64)
        want[sample] = 2
        assert torch.equal(found[sample], want)


def test_batch_of_none():
    assert fused(cast(problem(0, 7, 2, 8, 4, 5), torch.float32)).shape == (0, 16)


def test_nan_stays_in_its_sample():
    x, *rest = cast(problem(3, 9, 2, 8, 4, 5), torch.float32)
    clean = fused([x, *rest])
    x = x.clone()
    x[1, 4, 3] = torch.nan
    found = fused([x, *rest])
    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_same_bits_every_time_and_inputs_untouched():
    arguments = cast(problem(3, 9, 2, 8, 4, 40, depth=3), torch.float32)
    before = cast(arguments, torch.float32)
    assert torch.equal(fused(arguments), fused(arguments))
    assert torch.equal(arguments[0], before[0])
    for block, copy in zip(arguments[1], before[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block, copy, strict=True))


def test_nothing_is_written_outside(monkeypatch):
    """What a launch writes, the tokens between its blocks included, lies between guards that stay as they were."""
    arguments = cast(problem(2, 33, 1, 34, 7, 70, depth=3), torch.float32)
    want = fused(arguments)
    names, guarded = ("p_tokens", "p_stats", "p_room", "p_y"), []
    launched = kernels.Launch.run

    def run(launch):
        moved = dict(launch.arguments)
        for name in names:
            x = moved[name]
            whole = torch.full((x.numel() + 128,), 7, dtype=x.dtype, device=x.device)
            whole[64 : 64 + x.numel()] = torch.nan
            guarded.append((whole, x.numel()))
            moved[name] = whole[64 : 64 + x.numel()].view(x.shape)
        launched(launch._replace(arguments=moved))
        launch.arguments["p_y"].copy_(moved["p_y"])

    monkeypatch.setattr(kernels.Launch, "run", run)
    assert torch.equal(fused(arguments), want)
    assert len(guarded) == len(names)
    for whole, size in guarded:
        assert torch.all(whole[:64] == 7)
        assert torch.all(whole[64 + size :] == 7)


SIZES = {
    "64": (64, 4, 16, 32, 32),
    "128": (128, 4, 16, 32, 32),
    "long": (256, 1, 64, 64, 128, 9),
    "wide": (64, 2, 128, 128, 128),
}
# slow to compile: the chip with the least shared memory tells whether they fit
ONLY = {"folded 64": ("sm_100",), "lists long": ("gfx942",), "lists wide": ("gfx942",)}


def launches():
    found = {}
    for (name, size), kind in itertools.product(SIZES.items(), ("lists", "folded")):
        if kind == "folded" and name != "64":
            continue
        x, blocks, *norm = problem(1, *size, kind=kind)
        x = torch.empty((256, *x.shape[1:]), device="meta")
        weights, kinds = flat(blocks, True)
        weights = [w.to("meta", torch.float32) for w in weights]
        norm = [w.to("meta", torch.float32) for w in norm]
        y = x.new_empty(x.shape[0], x.shape[2])
        found[f"{kind} {name}"] = kernels.backbone_launch(x, weights, kinds, *norm, EPS, y)
    return found


def test_compiled_ahead():
    for name, targets in reports(__file__).items():
        for target, found in targets.items():
            where = f"{name}, {target}: {found}"
            assert found["shared"] <= SHARED[target], where
            assert found["tensor"] > 0, where
            if name.split()[1] in ("64", "128"):
                assert found["spills"] == 0, where
                # products and not the exchange of tokens fill shared memory
                assert found["shared"] <= 16384, where
