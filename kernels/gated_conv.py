"""Gated convolution: a program a tile of tokens, forward; programs that keep weight gradients, backward.

Depthwise output j reads input `j // 2`. For even d a pair of channels (2i, 2i + 1) therefore has one input i
for its values and one input d/2 + i for its gates, contiguous columns both: even and odd channels are tiles
of their own, never interleaved, and the gradient of an input is complete in the program of its pair. Odd d,
where pairs of values and of gates overlap, is served as the even problem of twice the width whose odd outputs
are zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, block, precision, shift
from .real import accumulate, norm_backward, normalised, product, statistics, tile

# programs of a backward launch, all chunks together; fixed, so that sums over samples have one order
PROGRAMS = 512


@triton.jit
def _input(
    p_x,
    p_nw,
    p_nb,
    mean,
    rstd,
    p_stats,
    t0,
    SHIFT: tl.constexpr,
    q0,
    T: tl.constexpr,
    d: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
):
    """Tokens t0 + SHIFT on, channels q0 on, zero outside; and the same before the norm's weight."""
    x = tile(p_x, t0 + SHIFT, q0, T, d, d, R, Q).to(tl.float32)
    plain = x
    if NORM:
        if p_stats is not None:
            row = t0 + SHIFT + tl.arange(0, R)
            mean = tl.load(p_stats + row, mask=(row >= 0) & (row < T), other=0.0)
            rstd = tl.load(p_stats + T + row, mask=(row >= 0) & (row < T), other=0.0)
        elif SHIFT != 0:
            # rows that the tile has no statistics for are outside of the sequence or of the tile's own tokens
            row = tl.minimum(tl.maximum(tl.arange(0, R) + SHIFT, 0), R - 1)
            mean, rstd = tl.gather(mean, row, 0), tl.gather(rstd, row, 0)
        plain, x = normalised(x, mean, rstd, p_nw, p_nb, t0 + SHIFT, q0, T, d, R, Q)
    return x, plain


@triton.jit
def _pair(
    p_x,
    p_dw,
    p_db,
    p_nw,
    p_nb,
    mean,
    rstd,
    p_stats,
    t0,
    q0,
    T: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
):
    """Depthwise outputs 2q and 2q + 1 of channels q0 on, for tokens t0 on."""
    q = q0 + tl.arange(0, Q)
    even = tl.zeros((R, Q), tl.float32)
    odd = tl.zeros((R, Q), tl.float32)
    even += tl.load(p_db + 2 * q, mask=q < d, other=0.0).to(tl.float32)[None, :]
    odd += tl.load(p_db + 2 * q + 1, mask=q < d, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(K):
        x, _ = _input(p_x, p_nw, p_nb, mean, rstd, p_stats, t0, tap - K // 2, q0, T, d, NORM, R, Q)
        even += x * tl.load(p_dw + 2 * q * K + tap, mask=q < d, other=0.0).to(tl.float32)[None, :]
        odd += x * tl.load(p_dw + (2 * q + 1) * K + tap, mask=q < d, other=0.0).to(tl.float32)[None, :]
    return even, odd


@triton.jit
def _transposed(even, odd, p_dw, q0, d: tl.constexpr, K: tl.constexpr, R: tl.constexpr, Q: tl.constexpr):
    """Gradient of channels q0 on from those of their depthwise outputs: the same taps, the other way."""
    q = q0 + tl.arange(0, Q)
    found = tl.zeros((R, Q), tl.float32)
    for tap in tl.static_range(K):
        part = even * tl.load(p_dw + 2 * q * K + tap, mask=q < d, other=0.0).to(tl.float32)[None, :]
        part += odd * tl.load(p_dw + (2 * q + 1) * K + tap, mask=q < d, other=0.0).to(tl.float32)[None, :]
        if tap != K // 2:
            row = tl.arange(0, R)[:, None] + (K // 2 - tap) + tl.zeros((R, Q), tl.int32)
            moved = tl.gather(part, tl.minimum(tl.maximum(row, 0), R - 1), 0)
            part = tl.where((row >= 0) & (row < R), moved, 0.0)
        found += part
    return found


@triton.jit
def _columns(p, j0, i0, d: tl.constexpr, DB: tl.constexpr, Q: tl.constexpr):
    """Even and odd columns [DB, Q] of pairs i0 on of a (d, d) matrix, rows j0 on, read in whole vectors."""
    x = tile(p, j0, 2 * i0, d, d, d, DB, 2 * Q)
    return tl.split(tl.reshape(x, (DB, Q, 2)))


@triton.jit
def gated_conv_fwd_kernel(
    p_x,
    p_dw,
    p_db,
    p_pw,
    p_pb,
    p_nw,
    p_nb,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    HALO: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    NB: tl.constexpr,
    DB: tl.constexpr,
):
    BLOCKS: tl.constexpr = (d + DB - 1) // DB
    j0 = tl.program_id(0) % BLOCKS * DB
    t0 = tl.program_id(0) // BLOCKS % TILES * STEP
    at = (tl.program_id(0) // (BLOCKS * TILES)).to(tl.int64) * T * d
    convolve_tile(
        p_x + at, p_dw, p_db, p_pw, p_pb, p_nw, p_nb, None, p_y + at, t0, j0,
        T, d, K, STEP, HALO, EPS, NORM, p_x.dtype.element_ty, PRECISION, R, Q, NB, DB,
    )  # fmt: skip


@triton.jit
def convolve_tile(
    p_x,
    p_dw,
    p_db,
    p_pw,
    p_pb,
    p_nw,
    p_nb,
    p_stats,
    p_y,
    t0,
    j0,
    T: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    HALO: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    NB: tl.constexpr,
    DB: tl.constexpr,
):
    """Tokens t0 to t0 + STEP, outputs j0 to j0 + DB of y of one sample, products in TYPE.

    Where the norm's statistics are in memory, the means of T tokens and then their reciprocal deviations,
    tiles need no halo.
    """
    mean = tl.zeros((R,), tl.float32)
    rstd = tl.zeros((R,), tl.float32)
    if NORM and p_stats is None:
        mean, rstd = statistics(p_x, t0 - HALO, T, d, EPS, R, NB)
    y = tl.zeros((R, DB), tl.float32)
    for i0 in tl.range(0, d // 2, Q, loop_unroll_factor=1, num_stages=1):
        at = t0 - HALO
        value, value1 = _pair(p_x, p_dw, p_db, p_nw, p_nb, mean, rstd, p_stats, at, i0, T, d, K, NORM, R, Q)
        gate, gate1 = _pair(
            p_x, p_dw, p_db, p_nw, p_nb, mean, rstd, p_stats, at, d // 2 + i0, T, d, K, NORM, R, Q
        )
        even, odd = _columns(p_pw, j0, i0, d, DB, Q)
        y += product(value * tl.sigmoid(gate), tl.trans(even), TYPE, PRECISION)  # [R, DB]
        y += product(value1 * tl.sigmoid(gate1), tl.trans(odd), TYPE, PRECISION)
    t = t0 - HALO + tl.arange(0, R)[:, None]
    j = j0 + tl.arange(0, DB)
    y += tl.load(p_pb + j, mask=j < d, other=0.0).to(tl.float32)[None, :]
    if NORM:
        y += tile(p_x, t0 - HALO, j0, T, d, d, R, DB).to(tl.float32)
    own = (t >= t0) & (t < t0 + STEP) & (t < T) & (j < d)[None, :]
    tl.store(p_y + t * d + j[None, :], y.to(p_y.dtype.element_ty), mask=own)


@triton.jit
def _add_row(p, x, fresh, q, STRIDE: tl.constexpr, count):
    """Add a row of sums to numbers STRIDE apart that this program alone touches."""
    old = tl.load(p + q * STRIDE, mask=(q < count) & (fresh == 0), other=0.0)
    tl.store(p + q * STRIDE, old + x, mask=q < count)


@triton.jit(noinline=True)
def _backward_tile(
    s,
    t0,
    p_gy,
    p_x,
    p_dw,
    p_db,
    p_pw,
    p_nw,
    p_nb,
    p_gn,
    p_gdw,
    p_gdb,
    p_gpw,
    p_gpb,
    p_gnw,
    p_gnb,
    T: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    HALO: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    GX: tl.constexpr,
    GW: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    NB: tl.constexpr,
    DB: tl.constexpr,
):
    # a function of its own: inlined, ptxas keeps every address of the loops around it in registers
    TYPE: tl.constexpr = p_x.dtype.element_ty
    CHUNKS: tl.constexpr = (d // 2 + Q - 1) // Q
    part = (tl.program_id(0) // CHUNKS).to(tl.int64)
    fresh = (s == tl.program_id(0) // CHUNKS) & (t0 == 0)
    at = tl.cast(s, tl.int64) * T * d
    i0 = tl.program_id(0) % CHUNKS * Q
    first = t0 - HALO
    mean = tl.zeros((R,), tl.float32)
    rstd = tl.zeros((R,), tl.float32)
    if NORM:
        mean, rstd = statistics(p_x + at, first, T, d, EPS, R, NB)
    # products of Q rows: tensor memory, which sm_100 takes for 64 rows and more, is for kernels alone
    even = tl.zeros((Q, R), tl.float32)
    odd = tl.zeros((Q, R), tl.float32)
    for j0 in tl.range(0, d, DB, loop_unroll_factor=1, num_stages=1):
        gy = tile(p_gy + at, first, j0, T, d, d, R, DB)
        w, w1 = _columns(p_pw, j0, i0, d, DB, Q)
        even += product(tl.trans(w), tl.trans(gy), TYPE, PRECISION)  # [Q, R]
        odd += product(tl.trans(w1), tl.trans(gy), TYPE, PRECISION)
    even, odd = tl.trans(even), tl.trans(odd)
    v, v1 = _pair(p_x + at, p_dw, p_db, p_nw, p_nb, mean, rstd, None, first, i0, T, d, K, NORM, R, Q)
    g, g1 = _pair(p_x + at, p_dw, p_db, p_nw, p_nb, mean, rstd, None, first, d // 2 + i0, T, d, K, NORM, R, Q)
    g, g1 = tl.sigmoid(g), tl.sigmoid(g1)
    t = first + tl.arange(0, R)[:, None]
    own = (t >= t0) & (t < t0 + STEP) & (t < T)
    if GW:
        tl.debug_barrier()
        h = tl.where(own, v * g, 0.0)
        h1 = tl.where(own, v1 * g1, 0.0)
        p_gpw += part * d * d
        for j0 in tl.range(0, d, DB, loop_unroll_factor=1, num_stages=1):
            gy = tile(p_gy + at, first, j0, T, d, d, R, DB)
            gw = product(tl.trans(h), gy, TYPE, PRECISION)  # [Q, DB]
            gw1 = product(tl.trans(h1), gy, TYPE, PRECISION)
            gw = tl.reshape(tl.join(tl.trans(gw), tl.trans(gw1)), (DB, 2 * Q))
            accumulate(p_gpw, gw, fresh, j0, 2 * i0, d, d, d, DB, 2 * Q)
        c = 2 * i0 + tl.arange(0, 2 * Q)
        gy = tl.where(own, tile(p_gy + at, first, 2 * i0, T, d, d, R, 2 * Q).to(tl.float32), 0.0)
        _add_row(p_gpb + part * d, tl.sum(gy, 0), fresh, c, 1, d)
    # gradients of the depthwise outputs, of values and of gates
    gg = even * v * g * (1.0 - g)
    gg1 = odd * v1 * g1 * (1.0 - g1)
    gv = even * g
    gv1 = odd * g1
    for half in tl.static_range(2):
        tl.debug_barrier()
        e, o, q0 = gv, gv1, i0
        if half == 1:
            e, o, q0 = gg, gg1, i0 + d // 2
        # the last pairs of the values' half may be padding, whose channels are gates' inputs
        count = d // 2 + half * (d // 2)
        q = q0 + tl.arange(0, Q)
        if GX or NORM:
            gx = _transposed(e, o, p_dw, q0, d, K, R, Q)
            if GX:
                tl.store(
                    p_gn + at + t * d + q[None, :],
                    gx.to(p_gn.dtype.element_ty),
                    mask=own & (q < count)[None, :],
                )
            if NORM and GW:
                _, plain = _input(p_x + at, p_nw, p_nb, mean, rstd, None, first, 0, q0, T, d, NORM, R, Q)
                gx = tl.where(own, gx, 0.0)
                _add_row(p_gnw + part * d, tl.sum(gx * plain, 0), fresh, q, 1, count)
                _add_row(p_gnb + part * d, tl.sum(gx, 0), fresh, q, 1, count)
        if GW:
            e, o = tl.where(own, e, 0.0), tl.where(own, o, 0.0)
            _add_row(p_gdb + part * 2 * d, tl.sum(e, 0), fresh, q, 2, count)
            _add_row(p_gdb + part * 2 * d + 1, tl.sum(o, 0), fresh, q, 2, count)
            for tap in tl.static_range(K):
                x, _ = _input(
                    p_x + at, p_nw, p_nb, mean, rstd, None, first, tap - K // 2, q0, T, d, NORM, R, Q
                )
                p = p_gdw + part * 2 * d * K + tap
                _add_row(p, tl.sum(e * x, 0), fresh, q, 2 * K, count)
                _add_row(p + K, tl.sum(o * x, 0), fresh, q, 2 * K, count)
    # what threads of this program wrote is seen by all of them
    tl.debug_barrier()


@triton.jit
def gated_conv_bwd_kernel(
    p_gy,
    p_x,
    p_dw,
    p_db,
    p_pw,
    p_nw,
    p_nb,
    p_gn,
    p_gx,
    p_ticket,
    p_gdw,
    p_gdb,
    p_gpw,
    p_gpb,
    p_gnw,
    p_gnb,
    B,
    P,
    T: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    HALO: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    GX: tl.constexpr,
    GW: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    NB: tl.constexpr,
    DB: tl.constexpr,
):
    CHUNKS: tl.constexpr = (d // 2 + Q - 1) // Q
    for s in tl.range(tl.program_id(0) // CHUNKS, B, P, loop_unroll_factor=1, num_stages=1):
        for t0 in tl.range(0, T, STEP, loop_unroll_factor=1, num_stages=1):
            _backward_tile(
                s, t0, p_gy, p_x, p_dw, p_db, p_pw, p_nw, p_nb, p_gn,
                p_gdw, p_gdb, p_gpw, p_gpb, p_gnw, p_gnb,
                T, d, K, STEP, HALO, EPS, NORM, GX, GW, PRECISION, R, Q, NB, DB,
            )  # fmt: skip
        if NORM and GX:
            at = tl.cast(s, tl.int64) * T * d
            norm_backward(
                p_ticket + s, CHUNKS, p_gn + at, p_x + at, p_gy + at, p_nw, p_gx + at, T, d, EPS, R, NB
            )


def _constants(x: Tensor, dw_weight: Tensor, norm: bool, eps: float, reach: int) -> dict[str, Any]:
    """Sizes and tiles: where a tile of 64 rows does not hold all tokens, its own lie between halos.

    A halo reaches as far as the rows whose statistics or gradients the tile's own tokens need.
    """
    T, d = x.shape[1:]
    K = dw_weight.shape[-1]
    R = min(block(T), 64)
    halo = 0 if T <= R else reach
    step = R - 2 * halo
    return {
        "T": T,
        "d": d,
        "K": K,
        "STEP": step,
        "HALO": halo,
        "EPS": float(eps),
        "NORM": norm,
        "PRECISION": precision(),
        "R": R,
        "Q": 16,
        "NB": min(block(d), 32),
        "DB": min(block(d), 32),
    }


def gated_conv1d_launch(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> Launch:
    """The forward launch for even d, into y."""
    B, T, d = x.shape
    constants = _constants(x, dw_weight, norm_weight is not None, eps, dw_weight.shape[-1] // 2)
    tiles = -(-T // constants["STEP"])
    weights = {"p_dw": dw_weight, "p_db": dw_bias, "p_pw": pw_weight, "p_pb": pw_bias}
    weights |= {"p_nw": norm_weight, "p_nb": shift(norm_weight, norm_bias)}
    return Launch(
        gated_conv_fwd_kernel,
        (B * tiles * -(-d // constants["DB"]),),
        {"p_x": x, **weights, "p_y": y},
        {**constants, "TILES": tiles},
        num_warps=4,
    )


def _widened(x: Tensor, dw: Tensor, db: Tensor, pw: Tensor, pb: Tensor) -> tuple[Tensor, ...]:
    """The same convolution with every channel twice, every second output of the depthwise one zero."""
    d, k = x.shape[-1], dw.shape[-1]
    wide = torch.zeros(2 * d, 2, k, dtype=dw.dtype, device=x.device)
    wide[:, 0] = dw[:, 0]
    bias = torch.nn.functional.pad(db[:, None], (0, 1))
    point = torch.zeros(2 * d, d, 2, dtype=pw.dtype, device=x.device)
    point[:d, :, 0] = pw[..., 0]
    return (
        x.repeat_interleave(2, -1),
        wide.view(4 * d, 1, k),
        bias.reshape(4 * d),
        point.view(2 * d, 2 * d, 1),
        torch.nn.functional.pad(pb, (0, d)),
    )


def gated_conv1d(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The gated convolution of contiguous x `(B, T, d)`; with a norm `x + gated_conv1d(LayerNorm(x))`.

    dw_weight `(2d, 1, k)` with k odd, dw_bias `(2d,)`, pw_weight `(d, d, 1)`, pw_bias `(d,)`, all contiguous.
    """
    B, T, d = x.shape
    y = torch.empty_like(x)
    if B * T * d == 0:
        return y
    weights = (dw_weight, dw_bias, pw_weight, pw_bias)
    if d % 2:
        inner = x
        if norm_weight is not None:
            inner = _norm(x, norm_weight, norm_bias, eps)
        out = gated_conv1d(*_widened(inner, *weights), None, None, eps)[..., :d]
        return out.contiguous() if norm_weight is None else x + out
    gated_conv1d_launch(x, *weights, norm_weight, norm_bias, eps, y).run()
    return y


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    bias = None if bias is None else bias.float()
    wide = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias, eps)
    return wide.to(x.dtype)


def gated_conv1d_backward_launch(
    gy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gx: Tensor | None,
    want: bool,
) -> tuple[Launch, list[Tensor]]:
    """The backward launch for even d, into gx where there is one, and into partial sums where wanted."""
    B, T, d = x.shape
    norm, norm_bias = norm_weight is not None, shift(norm_weight, norm_bias)
    constants = _constants(x, dw_weight, norm, eps, 2 * (dw_weight.shape[-1] // 2))
    chunks = -(-d // (2 * constants["Q"]))
    P = min(B, max(1, PROGRAMS // chunks)) if want else B
    weights = (dw_weight, dw_bias, pw_weight, pw_bias, norm_weight, norm_bias)
    names = ("p_gdw", "p_gdb", "p_gpw", "p_gpb", "p_gnw", "p_gnb")
    partial = [x.new_empty((P, *w.shape), dtype=torch.float32) for w in weights if want and w is not None]
    arguments: dict[str, Tensor | int | None] = dict.fromkeys(names)
    arguments |= dict(zip(names, partial, strict=False))
    # the gradient of what the norm puts out waits for all channels, in float32
    wait = norm and gx is not None
    scratch = torch.empty_like(x, dtype=torch.float32) if wait and x.dtype != torch.float32 else gx
    ticket = torch.zeros(B, dtype=torch.int32, device=x.device) if wait else None
    arguments |= {
        "p_dw": dw_weight,
        "p_db": dw_bias,
        "p_pw": pw_weight,
        "p_nw": norm_weight,
        "p_nb": norm_bias,
    }
    arguments |= {"p_gn": scratch, "p_gx": gx, "p_ticket": ticket}
    launch = Launch(
        gated_conv_bwd_kernel,
        (P * chunks,),
        {"p_gy": gy, "p_x": x, **arguments, "B": B, "P": P},
        {**constants, "TILES": -(-T // constants["STEP"]), "GX": gx is not None, "GW": want},
        num_warps=8,
    )
    return launch, partial


def gated_conv1d_backward(
    gy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gx: bool,
    gw: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the six weights in the forward's order; those not wanted are empty.

    The gradients of weights are sums over samples: each program of a chunk of channels adds its own in their
    order, and one reduction adds the programs.
    """
    B, T, d = x.shape
    weights = (dw_weight, dw_bias, pw_weight, pw_bias, norm_weight, norm_bias)
    empty = x.new_empty(0)
    if B * T * d == 0:
        found = [torch.zeros_like(w) if gw and w is not None else x.new_empty(0) for w in weights]
        return (torch.empty_like(x) if gx else empty, *found)
    if d % 2:
        return _odd_backward(gy, x, *weights, eps, gx, gw)
    grad = torch.empty_like(x) if gx else None
    partial: list[Tensor] = []
    if gx or gw:
        launch, partial = gated_conv1d_backward_launch(gy, x, *weights, eps, grad, gw)
        launch.run()
    found = [p.sum(0).to(w.dtype) for p, w in zip(partial, weights, strict=False) if w is not None]
    found += [x.new_empty(0) for _ in range(len(weights) - len(found))]
    return (empty if grad is None else grad, *found)


def _odd_backward(
    gy: Tensor,
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gx: bool,
    gw: bool,
) -> tuple[Tensor, ...]:
    """The backward for odd d, through the even problem of twice the width."""
    d, k = x.shape[-1], dw_weight.shape[-1]
    inner = x if norm_weight is None else _norm(x, norm_weight, norm_bias, eps)
    wide = _widened(inner, dw_weight, dw_bias, pw_weight, pw_bias)
    gy2 = torch.nn.functional.pad(gy, (0, d))
    need = gx or (gw and norm_weight is not None)
    g, *found = gated_conv1d_backward(gy2, *wide, None, None, eps, need, gw)
    none = x.new_empty(0)
    if need:
        g = g.float().unflatten(-1, (d, 2)).sum(-1)
    if gw:
        found[0] = found[0].view(2 * d, 2, k)[:, :1].clone()
        found[1] = found[1].view(2 * d, 2)[:, 0].clone()
        found[2] = found[2].view(2 * d, d, 2)[:d, :, :1].clone()
        found[3] = found[3][:d].clone()
    if norm_weight is not None and need:
        wide_x = x.float()
        mean = wide_x.mean(-1, keepdim=True)
        rstd = (wide_x.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
        plain = (wide_x - mean) * rstd
        if gw:
            found[4] = (g * plain).sum((0, 1)).to(norm_weight.dtype)
            if norm_bias is not None:
                found[5] = g.sum((0, 1)).to(norm_bias.dtype)
        h = g * norm_weight.float()
        g = gy.float() + rstd * (h - h.mean(-1, keepdim=True) - plain * (h * plain).mean(-1, keepdim=True))
    return (g.to(x.dtype) if gx else none, *found)
