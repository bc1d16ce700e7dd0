"""The projection of a channel and its coarse map, which is never built.

The coarse map is `A Hd C^T`: A and C pool pairs and interpolate back, `A = U_M P_M`. C goes into the weight,
once a call; `P_M` is taken while rows are loaded, `U_M`, two entries a row, is applied to the product:
`X = Hd W1^T + U_M (P_M Hd W2f^T) + b + pos`. With K = 2N real columns that is 1.5 M K d multiply-adds a
sample instead of the 2 M K d of the concatenation. Backward: `gHd = gX W1 + P_M^T (U_M^T gX) W2f`, with
`U_M^T` a few rows of gX by a table; weights: `gX^T Hd` and `(U_M^T gX)^T (P_M Hd)`, partial sums of a fixed
number of programs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import load_rows, load_transposed
from .launch import Launch, block, precision

# programs that keep a scratch each, and partial sums of the weight's gradient
PROGRAMS = 512
PARTIALS = 128


def _upsampling(n: int) -> tuple[Tensor, Tensor]:
    """For each of n rows its lower neighbour among n // 2 and the share of the upper one, as torch has it."""
    half = n // 2
    centre = ((torch.arange(n, dtype=torch.float64) + 0.5) * half / n - 0.5).clamp(0, half - 1)
    low = centre.floor().clamp(max=half - 1)
    return low.to(torch.int32), centre - low


def _upsampling_matrix(n: int) -> Tensor:
    low, share = _upsampling(n)
    half, rows = n // 2, torch.arange(n)
    up = torch.zeros(n, half, dtype=torch.float64)
    up[rows, low.long()] += 1 - share
    up[rows, (low.long() + 1).clamp(max=half - 1)] += share
    return up


@functools.lru_cache(maxsize=64)
def row_table(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`low (n,)` int32 and `share (n,)` of the interpolation of n rows."""
    with torch.inference_mode(False), torch.no_grad():
        low, share = _upsampling(n)
        return low.to(device), share.float().to(device)


@functools.lru_cache(maxsize=64)
def transposed_table(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The transposed interpolation: first row and weights `(n - n // 2, taps)`, zero for a row in no pair."""
    with torch.inference_mode(False), torch.no_grad():
        up = _upsampling_matrix(n)
        half = n // 2
        first = torch.zeros(n - half, dtype=torch.int32)
        spans = [up[:, i].nonzero().flatten() for i in range(half)]
        weights = torch.zeros(n - half, max(int(s[-1] - s[0]) + 1 for s in spans), dtype=torch.float64)
        for i, span in enumerate(spans):
            first[i] = span[0]
            weights[i, span - span[0]] = up[span, i]
        return first.to(device), weights.float().to(device)


@functools.lru_cache(maxsize=64)
def _column_matrix(n: int, device: torch.device) -> Tensor:
    """C: pooling of pairs and interpolation back, `(n, n)`."""
    with torch.inference_mode(False), torch.no_grad():
        pool = torch.zeros(n // 2, n, dtype=torch.float64)
        i = torch.arange(n // 2)
        pool[i, 2 * i] = pool[i, 2 * i + 1] = 0.5
        return (_upsampling_matrix(n) @ pool).float().to(device)


def fold(weight: Tensor, N: int) -> Tensor:
    """`[W1, W2f]` `(d, 4N)`: the half that meets the coarse map takes in C."""
    fine, coarse = weight.unflatten(1, (2, N, 2)).unbind(1)
    folded = torch.einsum("dnc,nk->dkc", coarse, _column_matrix(N, weight.device))
    return torch.stack([fine, folded], 1).flatten(1)


def unfold(gradient: Tensor, N: int) -> Tensor:
    """The transpose of `fold`: the gradient of the weight from that of the folded one."""
    fine, folded = gradient.unflatten(1, (2, N, 2)).unbind(1)
    coarse = torch.einsum("dkc,nk->dnc", folded, _column_matrix(N, gradient.device))
    return torch.stack([fine, coarse], 1).flatten(1)


@triton.jit
def project_sample(
    p_h,
    p_w,
    p_bias,
    p_pos,
    p_low,
    p_share,
    p_s,
    p_x,
    M,
    N,
    d,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tokens (M, d) of one sample's Hd (M, N, 2); p_s holds (M // 2, d) between the two products."""
    half = M // 2
    width = 2 * N
    for j0 in range(0, d, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        for i0 in range(0, half, ROWS):
            i = i0 + tl.arange(0, ROWS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k0 in tl.range(0, width, INNER, num_stages=1, loop_unroll_factor=1):
                even = load_rows(p_h, 2 * width, width, i, k0, half, INNER)  # [R, K]
                odd = load_rows(p_h + width, 2 * width, width, i, k0, half, INNER)  # [R, K]
                w = load_transposed(p_w + width, 2 * width, k0, j0, width, d, INNER, COLUMNS)  # [K, J]
                acc = tl.dot(0.5 * (even + odd), w, acc=acc, input_precision=PRECISION)
            mask = (i[:, None] < half) & (j[None, :] < d)
            tl.store(p_s + i[:, None] * d + j[None, :], acc, mask=mask)  # [R, J]
    tl.debug_barrier()
    for j0 in range(0, d, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        bias = tl.load(p_bias + j, mask=j < d, other=0.0)  # [J]
        for i0 in range(0, M, ROWS):
            i = i0 + tl.arange(0, ROWS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k0 in tl.range(0, width, INNER, num_stages=1, loop_unroll_factor=1):
                h = load_rows(p_h, width, width, i, k0, M, INNER)  # [R, K]
                w = load_transposed(p_w, 2 * width, k0, j0, width, d, INNER, COLUMNS)  # [K, J]
                acc = tl.dot(h, w, acc=acc, input_precision=PRECISION)
            mask = (i[:, None] < M) & (j[None, :] < d)
            low = tl.load(p_low + i, mask=i < M, other=0)  # [R]
            share = tl.load(p_share + i, mask=i < M, other=0.0)  # [R]
            high = tl.minimum(low + 1, half - 1)
            below = tl.load(p_s + low[:, None] * d + j[None, :], mask=mask, other=0.0)  # [R, J]
            above = tl.load(p_s + high[:, None] * d + j[None, :], mask=mask, other=0.0)  # [R, J]
            pos = tl.load(p_pos + i[:, None] * d + j[None, :], mask=mask, other=0.0)  # [R, J]
            acc += (1 - share)[:, None] * below + share[:, None] * above + (bias[None, :] + pos)
            tl.store(p_x + i[:, None] * d + j[None, :], acc, mask=mask)  # [R, J]
    tl.debug_barrier()


@triton.jit
def dual_view_fwd_kernel(
    p_h,
    p_w,
    p_bias,
    p_pos,
    p_low,
    p_share,
    p_s,
    p_x,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    d: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    p_s += program * (M // 2) * d
    for b in range(program, B, tl.num_programs(0)):
        offset = b * M
        project_sample(
            p_h + offset * (2 * N),
            p_w,
            p_bias,
            p_pos,
            p_low,
            p_share,
            p_s,
            p_x + offset * d,
            M,
            N,
            d,
            ROWS,
            INNER,
            COLUMNS,
            PRECISION,
        )


@triton.jit
def gather_rows(p_g, p_first, p_t, M, d, i, k0, TAPS: tl.constexpr, WIDTH: tl.constexpr):
    """`U_M^T gX`: rows i of the pooled map, columns from k0 on, as weighted sums of rows of gX (M, d)."""
    k = k0 + tl.arange(0, WIDTH)[None, :]
    inside = i < M - M // 2
    first = tl.load(p_first + i, mask=inside, other=M)  # [R]
    acc = tl.zeros((i.shape[0], WIDTH), tl.float32)
    for t in tl.static_range(TAPS):
        weight = tl.load(p_t + i * TAPS + t, mask=inside, other=0.0)  # [R]
        # a tap without weight reads nothing: another row's infinity must not become NaN here
        mask = ((weight != 0) & (first + t < M))[:, None] & (k < d)
        acc += weight[:, None] * tl.load(p_g + (first + t)[:, None] * d + k, mask=mask, other=0.0)  # [R, W]
    return acc


@triton.jit
def dual_view_bwd_kernel(
    p_g,
    p_w,
    p_first,
    p_t,
    p_gh,
    M: tl.constexpr,
    N: tl.constexpr,
    d: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pairs of rows of gHd: both take the pair's share of the coarse map."""
    width = 2 * N
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n0 = tl.program_id(2) * COLUMNS
    p_g += b * M * d
    p_gh += b * M * width
    even = tl.zeros((ROWS, COLUMNS), tl.float32)
    odd = tl.zeros((ROWS, COLUMNS), tl.float32)
    both = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k0 in tl.range(0, d, INNER, num_stages=1, loop_unroll_factor=1):
        k = k0 + tl.arange(0, INNER)
        w = load_rows(p_w, 2 * width, width, k, n0, d, COLUMNS)  # [K, C]
        even = tl.dot(
            load_rows(p_g, 2 * d, d, i, k0, (M + 1) // 2, INNER), w, acc=even, input_precision=PRECISION
        )
        odd = tl.dot(
            load_rows(p_g + d, 2 * d, d, i, k0, M // 2, INNER), w, acc=odd, input_precision=PRECISION
        )
        w = load_rows(p_w + width, 2 * width, width, k, n0, d, COLUMNS)  # [K, C]
        pooled = gather_rows(p_g, p_first, p_t, M, d, i, k0, TAPS, INNER)  # [R, K]
        both = tl.dot(pooled, w, acc=both, input_precision=PRECISION)
    n = n0 + tl.arange(0, COLUMNS)
    p_gh += i[:, None] * (2 * width) + n[None, :]
    mask = n[None, :] < width
    tl.store(p_gh, even + 0.5 * both, mask=mask & (i[:, None] < (M + 1) // 2))  # [R, C]
    tl.store(p_gh + width, odd + 0.5 * both, mask=mask & (i[:, None] < M // 2))  # [R, C]


@triton.jit
def dual_view_weight_bwd_kernel(
    p_g,
    p_h,
    p_first,
    p_t,
    p_gw,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    d: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program's partial sum, over its samples in order, of a tile of both halves of the folded weight."""
    width = 2 * N
    program = tl.program_id(0).to(tl.int64)
    j0 = tl.program_id(1) * ROWS
    n0 = tl.program_id(2) * COLUMNS
    fine = tl.zeros((ROWS, COLUMNS), tl.float32)
    coarse = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b in range(program, B, tl.num_programs(0)):
        p_gb = p_g + b * M * d
        p_hb = p_h + b * M * width
        for i0 in tl.range(0, (M + 1) // 2, INNER, num_stages=1, loop_unroll_factor=1):
            i = i0 + tl.arange(0, INNER)
            even = load_rows(p_hb, 2 * width, width, i, n0, (M + 1) // 2, COLUMNS)  # [K, C]
            odd = load_rows(p_hb + width, 2 * width, width, i, n0, M // 2, COLUMNS)  # [K, C]
            g = load_rows(p_gb, 2 * d, d, i, j0, (M + 1) // 2, ROWS)  # [K, R]
            fine = tl.dot(tl.trans(g), even, acc=fine, input_precision=PRECISION)
            g = load_rows(p_gb + d, 2 * d, d, i, j0, M // 2, ROWS)  # [K, R]
            fine = tl.dot(tl.trans(g), odd, acc=fine, input_precision=PRECISION)
            g = gather_rows(p_gb, p_first, p_t, M, d, i, j0, TAPS, ROWS)  # [K, R]
            # the last row of an odd number is in no pair, and its partner reads as zero
            pair = tl.where((i < M // 2)[:, None], 0.5 * (even + odd), 0.0)
            coarse = tl.dot(tl.trans(g), pair, acc=coarse, input_precision=PRECISION)
    j = j0 + tl.arange(0, ROWS)
    n = n0 + tl.arange(0, COLUMNS)
    p_gw += (program * d + j[:, None]) * (2 * width) + n[None, :]
    mask = (j[:, None] < d) & (n[None, :] < width)
    tl.store(p_gw, fine, mask=mask)  # [R, C]
    tl.store(p_gw + width, coarse, mask=mask)  # [R, C]


def projection_blocks(M: int, d: int) -> dict[str, int]:
    """Tiles of `project_sample`; where rows need several of 64, the addresses of both spill on sm_80."""
    return {"ROWS": block(M) if M <= 64 else 32, "INNER": 16, "COLUMNS": min(64, block(d))}


def forward_launch(Hd: Tensor, folded: Tensor, bias: Tensor, pos: Tensor) -> tuple[Launch, Tensor]:
    """The projection with folded weights, and where it puts X."""
    B, M, N, _ = Hd.shape
    d = folded.shape[0]
    programs = min(B, PROGRAMS)
    low, share = row_table(M, Hd.device)
    X = Hd.new_empty((B, M, d))
    arguments = {
        "p_h": Hd,
        "p_w": folded,
        "p_bias": bias,
        "p_pos": pos,
        "p_low": low,
        "p_share": share,
        "p_s": Hd.new_empty((programs, M // 2, d)),
        "p_x": X,
        "B": B,
    }
    blocks = projection_blocks(M, d)
    constants = {"M": M, "N": N, "d": d, **blocks, "PRECISION": precision()}
    warps = max(1, min(8, blocks["ROWS"] * blocks["COLUMNS"] // 512))
    return Launch(dual_view_fwd_kernel, (programs,), arguments, constants, warps), X


def backward_launch(gX: Tensor, folded: Tensor, N: int) -> tuple[Launch, Tensor]:
    """The gradient of Hd, and where it goes."""
    B, M, d = gX.shape
    first, weights = transposed_table(M, gX.device)
    gHd = gX.new_empty((B, M, N, 2))
    rows, columns = min(32, block((M + 1) // 2)), min(64, block(2 * N))
    arguments = {"p_g": gX, "p_w": folded, "p_first": first, "p_t": weights, "p_gh": gHd}
    sizes = {"M": M, "N": N, "d": d, "TAPS": weights.shape[1]}
    tiles = {"ROWS": rows, "INNER": 16, "COLUMNS": columns, "PRECISION": precision()}
    grid = (B, triton.cdiv((M + 1) // 2, rows), triton.cdiv(2 * N, columns))
    return Launch(dual_view_bwd_kernel, grid, arguments, sizes | tiles), gHd


def weight_launch(gX: Tensor, Hd: Tensor) -> tuple[Launch, Tensor]:
    """Partial sums of the folded weight's gradient, and where they go."""
    B, M, N, _ = Hd.shape
    d = gX.shape[2]
    first, weights = transposed_table(M, gX.device)
    programs = min(B, PARTIALS)
    partial = gX.new_empty((programs, d, 4 * N))
    rows, columns = min(64, block(d)), min(64, block(2 * N))
    arguments = {"p_g": gX, "p_h": Hd, "p_first": first, "p_t": weights, "p_gw": partial, "B": B}
    sizes = {"M": M, "N": N, "d": d, "TAPS": weights.shape[1]}
    tiles = {"ROWS": rows, "INNER": 16, "COLUMNS": columns, "PRECISION": precision()}
    grid = (programs, triton.cdiv(d, rows), triton.cdiv(2 * N, columns))
    # two sums are kept: eight warps halve what a thread holds
    return Launch(dual_view_weight_bwd_kernel, grid, arguments, sizes | tiles, 8), partial


def dual_view_project(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    """Tokens `X (B, M, d)` of `Hd (B, M, N, 2)`; weight `(d, 4N)`, bias `(d,)`, pos `(1, M, d)`."""
    launch, X = forward_launch(Hd, fold(weight, Hd.shape[2]), bias, pos)
    launch.run()
    return X


def dual_view_project_backward(
    gX: Tensor, Hd: Tensor, weight: Tensor, gh: bool, gw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Hd (empty without `gh`) and of weight, bias and pos (empty without `gw`)."""
    N = Hd.shape[2]
    gHd, gweight, gbias, gpos = (gX.new_empty((0,)) for _ in range(4))
    if gh:
        launch, gHd = backward_launch(gX, fold(weight, N), N)
        launch.run()
    if gw:
        launch, partial = weight_launch(gX, Hd)
        launch.run()
        gweight = unfold(partial.sum(0), N)
        gpos = gX.sum(0, keepdim=True)
        gbias = gpos.sum((0, 1))
    return gHd, gweight, gbias, gpos
