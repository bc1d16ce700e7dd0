"""The complex tiles that every Triton kernel is made of, interpreted where there is no device."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lomacs_fast.kernels.complex import cdot, load_complex, store_complex
from lomacs_fast.kernels.launch import Launch, block, precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def gram_kernel(p_u, p_g, M, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    ur, ui = load_complex(p_u, M, r, 0, ROWS, COLUMNS)
    gr, gi = cdot(tl.trans(ur), -tl.trans(ui), ur, ui, PRECISION)
    store_complex(p_g, gr, gi, r, r, 0, COLUMNS, COLUMNS)


@pytest.mark.parametrize("size", [(64, 32), (63, 11), (17, 17), (1, 1), (5, 3)])
def test_tiles_of_any_size(size):
    M, r = size
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(M, r, dtype=torch.complex64, generator=generator).to(DEVICE)
    G = torch.full((r, r), torch.nan, dtype=torch.complex64, device=DEVICE)
    Launch(
        gram_kernel,
        (1,),
        {"p_u": torch.view_as_real(U), "p_g": torch.view_as_real(G), "M": M, "r": r},
        {"ROWS": block(M), "COLUMNS": block(r), "PRECISION": precision()},
    ).run()
    double = U.to(torch.complex128)
    torch.testing.assert_close(G.to(torch.complex128), double.mH @ double, rtol=0, atol=4e-6 * M)


def test_an_empty_grid_does_nothing():
    Launch(None, (0,), {}, {}).run()


@pytest.mark.parametrize(("n", "power"), [(1, 16), (16, 16), (17, 32), (63, 64), (64, 64), (65, 128)])
def test_blocks_are_powers_of_two(n, power):
    assert block(n) == power
