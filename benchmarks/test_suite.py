"""The suite's variants under pytest-benchmark: `pytest benchmarks/`, with its options to save and compare.

Each is checked as `lomacs-fast bench` checks it; one that is wrong fails here instead of being listed.
"""

import pytest
import torch

from lomacs_fast.benchmarks import suite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = suite.Options(device=DEVICE, quick=True, sweeps=False, compiled=False)
VARIANTS = ("eager", "ours")
DECOMPOSED = (*VARIANTS, "frozen", "approx_svd", "svd" if DEVICE == "cpu" else "svd gesvdj", "svd_lowrank")


def named(make):
    parts = [getattr(x, "function", x) for x in make.args if not isinstance(x, bool)]
    passes = ["backward" if x else "forward" for x in make.args[3:4] if isinstance(x, bool)]
    return "-".join(map(str, [make.func.__name__.removesuffix("_case"), *parts, *passes]))


PARAMETERS = [
    pytest.param(make, variant, id=f"{named(make)}-{variant}")
    for make in suite.cases(OPTIONS)
    for variant in (DECOMPOSED if make.func is suite.inference_case else VARIANTS)
]
MADE = {}


def made(make):
    # the variants of a case come one after the other: one case is kept
    if make not in MADE:
        MADE.clear()
        MADE[make] = make()
    return MADE[make]


@pytest.mark.parametrize(("make", "variant"), PARAMETERS)
def test_variant(benchmark, make, variant):
    case = made(make)
    benchmark.group = named(make)
    benchmark.extra_info.update(stem=case.stem, size=case.size, batch=case.batch, device=case.device)
    call = case.variants[variant]
    if variant in case.alike:
        eager, found = (
            suite.largest_error(case.compared(c()), case.exact) for c in (case.variants["eager"], call)
        )
        assert found <= case.factor * eager + 4 * suite.EPS
    once = suite.timer(call, case.device)
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
