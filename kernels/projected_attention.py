"""Projected attention: a program a group of a sample, forward; programs that keep weight gradients, backward.

With X the g columns of a group (normalised where the norm is fused), reducing first and folding weights:
`R_k = P_k^T X`, `R_v = P_v^T X`, `N = R_k W_k^T W_q`, `O = R_v W_v^T W_o^T`, all of k_len rows, and then
`y = softmax(X N^T / sqrt(a)) O`: tokens meet k_len x g matrices alone, in tiles, twice.

A program reads its tokens once and keeps them in registers: forward up to 64 numbers a thread, which is
T = 256 of 64 channels, backward up to 32, T = 128 of 64 channels or of 16. A norm's statistics are those of
whole rows: forward, a program reads the other groups' columns too, once. Backward, what else is read again
lies in L1 or L2: the gradient of y once more; under a norm the rows, twice for the statistics and four times
by the last program of a sample. Larger tokens go in tiles, read in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, block, precision, shift
from .real import accumulate, norm_backward, normalised, product, statistics, store_tile, tile

# programs of a backward launch, all groups together; fixed, so that sums over samples have one order
PROGRAMS = 512
# rows of k_len at once, where all of them are too many
CHUNK = 32
# numbers of a group's tokens that a thread keeps, forward and backward
HELD, HELD_BACKWARD = 64, 32


@triton.jit
def _hold(
    p_x,
    p_stats,
    c0,
    T: tl.constexpr,
    d: tl.constexpr,
    g: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    TT: tl.constexpr,
    GB: tl.constexpr,
    HELD: tl.constexpr,
):
    """All tokens of one group, `[HELD, TT, GB]`, and the norm's statistics where memory has none; read once.

    Tiles lie side by side in a thread's registers. The other groups' columns meet the statistics alone:
    means and squares of equal parts add up (Chan), so that none is read twice.
    """
    t = tl.arange(0, HELD)[:, None] * TT + tl.arange(0, TT)[None, :]
    c = tl.arange(0, GB)[None, None, :]
    p = p_x + t[:, :, None] * d + c
    inside = (t < T)[:, :, None] & (c < g)
    x = tl.load(p + c0, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((HELD, TT), tl.float32)
    rstd = tl.zeros((HELD, TT), tl.float32)
    if NORM and p_stats is None:
        mean = tl.sum(x, 2) / g
        away = tl.where(c < g, x - mean[:, :, None], 0.0)
        square = tl.sum(away * away, 2)
        for i in tl.range(1, d // g, loop_unroll_factor=1, num_stages=1):
            # those before the own group, then those after it
            y = tl.load(p + tl.where(i * g <= c0, i - 1, i) * g, mask=inside, other=0.0).to(tl.float32)
            own = tl.sum(y, 2) / g
            away = tl.where(c < g, y - own[:, :, None], 0.0)
            apart = own - mean
            mean += apart / (i + 1)
            square += tl.sum(away * away, 2) + apart * apart * (g * i / (i + 1))
        rstd = 1.0 / tl.sqrt_rn(square / d + EPS)
    return x, mean, rstd


@triton.jit
def _one_of(held, i, HELD: tl.constexpr):
    """Tile i of those held, [TT, GB]."""
    return tl.sum(tl.where((tl.arange(0, HELD) == i)[:, None, None], held, 0.0), 0)


@triton.jit
def _tokens(
    p_x,
    held,
    p_nw,
    p_nb,
    t0,
    c0,
    T,
    d,
    g,
    p_stats,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    HELD: tl.constexpr,
):
    """One group of tokens t0 on, [TT, GB]: as attention takes it; before the norm's weight; as it is."""
    raw = _one_of(held[0], t0 // TT, HELD) if HELD else tile(p_x + c0, t0, 0, T, g, d, TT, GB)
    x, plain = raw, raw
    if NORM:
        if p_stats is not None:
            t = t0 + tl.arange(0, TT)
            mean = tl.load(p_stats + t, mask=t < T, other=0.0)
            rstd = tl.load(p_stats + T + t, mask=t < T, other=0.0)
        elif HELD:
            this = tl.arange(0, HELD)[:, None] == t0 // TT
            mean, rstd = tl.sum(tl.where(this, held[1], 0.0), 0), tl.sum(tl.where(this, held[2], 0.0), 0)
        else:
            mean, rstd = statistics(p_x, t0, T, d, EPS, TT, DB)
        plain, x = normalised(raw, mean, rstd, p_nw + c0, p_nb + c0, t0, 0, T, g, TT, GB)
    return x, plain, raw


@triton.jit
def _logits(x, n, k0, k, SCALE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, KB: tl.constexpr):
    """Scaled logits of tokens in rows k0 on of k; no others."""
    logits = product(x, tl.trans(n), TYPE, PRECISION) * SCALE  # [TT, KB]
    return tl.where(k0 + tl.arange(0, KB)[None, :] < k, logits, float("-inf"))


@triton.jit
def _softmax(x, n, k, SCALE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, KB: tl.constexpr):
    """Weights of the k_len rows for each token."""
    logits = _logits(x, n, 0, k, SCALE, TYPE, PRECISION, KB)
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    return share / tl.sum(share, 1)[:, None]


@triton.jit
def _kept(p, r0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from row r0 on of a program's own padded matrix."""
    return tl.load(p + (r0 + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _keep(p, x, r0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows r0 on of a program's own padded matrix."""
    tl.store(p + (r0 + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], x)


@triton.jit
def projected_attention_fwd_kernel(
    p_x,
    p_wq,
    p_wk,
    p_wv,
    p_wo,
    p_pk,
    p_pv,
    p_nw,
    p_nb,
    p_room,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    G: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    TYPE: tl.constexpr = p_x.dtype.element_ty
    group = tl.program_id(0) % G
    at = (tl.program_id(0) // G).to(tl.int64) * T * d
    if p_room is not None:
        p_room += tl.program_id(0).to(tl.int64) * ((k + KB - 1) // KB * KB * 2 * GB)
    attend_group(
        p_x + at, p_wq + group * a * g, p_wk + group * a * g, p_wv + group * g * g, p_wo + group * g * g,
        p_pk + group * T * k, p_pv + group * T * k, p_nw, p_nb, None, p_room, p_y + at, group * g,
        T, d, g, a, k, EPS, SCALE, NORM, False, TYPE, PRECISION, TT, DB, GB, AB, KB, HELD,
    )  # fmt: skip


@triton.jit
def projected_attention_groups_fwd_kernel(
    p_x,
    weights,
    p_nw,
    p_nb,
    p_room,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    G: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    # weights lie apart, so each group is code of its own
    at = (tl.program_id(0) // G).to(tl.int64) * T * d
    if p_room is not None:
        p_room += tl.program_id(0).to(tl.int64) * ((k + KB - 1) // KB * KB * 2 * GB)
    for i in tl.static_range(G):
        if tl.program_id(0) % G == i:
            attend_group(
                p_x + at, weights[i], weights[G + i], weights[2 * G + i], weights[3 * G + i],
                weights[4 * G + i], weights[5 * G + i], p_nw, p_nb, None, p_room, p_y + at, i * g,
                T, d, g, a, k, EPS, SCALE, NORM, False, p_x.dtype.element_ty, PRECISION,
                TT, DB, GB, AB, KB, HELD,
            )  # fmt: skip


@triton.jit
def _reduced(
    p_x,
    held,
    p_wq,
    p_wk,
    p_wv,
    p_wo,
    p_pk,
    p_pv,
    p_nw,
    p_nb,
    p_stats,
    c0,
    k0,
    T: tl.constexpr,
    d: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    FOLDED: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    """Rows k0 on of N and O; of weights that are folded already, `W_k^T W_q` is p_wq, `W_v^T W_o^T` p_wv."""
    rk = tl.zeros((KB, GB), tl.float32)
    rv = tl.zeros((KB, GB), tl.float32)
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        x, _, _ = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
        rk += product(tl.trans(tile(p_pk, t0, k0, T, k, k, TT, KB)), x, TYPE, PRECISION)
        rv += product(tl.trans(tile(p_pv, t0, k0, T, k, k, TT, KB)), x, TYPE, PRECISION)
    if FOLDED:
        n = product(rk, tl.trans(tile(p_wq, 0, 0, g, g, g, GB, GB)), TYPE, PRECISION)  # [KB, GB]
        o = product(rv, tile(p_wv, 0, 0, g, g, g, GB, GB), TYPE, PRECISION)  # [KB, GB]
    else:
        keys = product(rk, tl.trans(tile(p_wk, 0, 0, a, g, g, AB, GB)), TYPE, PRECISION)  # [KB, AB]
        n = product(keys, tile(p_wq, 0, 0, a, g, g, AB, GB), TYPE, PRECISION)  # [KB, GB]
        values = product(rv, tl.trans(tile(p_wv, 0, 0, g, g, g, GB, GB)), TYPE, PRECISION)  # [KB, GB]
        o = product(values, tl.trans(tile(p_wo, 0, 0, g, g, g, GB, GB)), TYPE, PRECISION)  # [KB, GB]
    return n, o


@triton.jit
def attend_group(
    p_x,
    p_wq,
    p_wk,
    p_wv,
    p_wo,
    p_pk,
    p_pv,
    p_nw,
    p_nb,
    p_stats,
    p_room,
    p_y,
    c0,
    T: tl.constexpr,
    d: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    FOLDED: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    """Columns c0 to c0 + g of y of one sample, every pointer at the sample or the group.

    More than KB rows of k_len go in chunks, which wait in the program's room.
    """
    held = None
    if HELD:
        held = _hold(p_x, p_stats, c0, T, d, g, EPS, NORM, TT, GB, HELD)
    if k <= KB:
        n, o = _reduced(
            p_x, held, p_wq, p_wk, p_wv, p_wo, p_pk, p_pv, p_nw, p_nb, p_stats, c0, 0,
            T, d, g, a, k, EPS, NORM, FOLDED, TYPE, PRECISION, TT, DB, GB, AB, KB, HELD,
        )  # fmt: skip
    else:
        p_o = p_room + (k + KB - 1) // KB * KB * GB
        # the last call's rows were read by all threads
        tl.debug_barrier()
        for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
            n, o = _reduced(
                p_x, held, p_wq, p_wk, p_wv, p_wo, p_pk, p_pv, p_nw, p_nb, p_stats, c0, k0,
                T, d, g, a, k, EPS, NORM, FOLDED, TYPE, PRECISION, TT, DB, GB, AB, KB, HELD,
            )  # fmt: skip
            _keep(p_room, n, k0, KB, GB)
            _keep(p_o, o, k0, KB, GB)
        tl.debug_barrier()
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        x, _, raw = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
        if k <= KB:
            share = _softmax(x, n, k, SCALE, TYPE, PRECISION, KB)
            y = product(share, o, TYPE, PRECISION)  # [TT, GB]
        else:
            top = tl.full((TT,), float("-inf"), tl.float32)
            total = tl.zeros((TT,), tl.float32)
            y = tl.zeros((TT, GB), tl.float32)
            for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
                logits = _logits(x, _kept(p_room, k0, KB, GB), k0, k, SCALE, TYPE, PRECISION, KB)
                higher = tl.maximum(top, tl.max(logits, 1))
                share = tl.exp(logits - higher[:, None])
                before = tl.exp(top - higher)
                total = total * before + tl.sum(share, 1)
                y = y * before[:, None] + product(share, _kept(p_o, k0, KB, GB), TYPE, PRECISION)
                top = higher
            y = y / total[:, None]
        if NORM:
            y += raw.to(tl.float32)
        store_tile(p_y + c0, y, t0, 0, T, g, d, TT, GB)


@triton.jit
def _softmax_statistics(
    p_x,
    held,
    p_gy,
    p_nw,
    p_nb,
    p_n,
    p_o,
    p_stats,
    c0,
    T: tl.constexpr,
    d: tl.constexpr,
    g: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    """Of every token, over all chunks of k_len: maximum, sum, and mean of the gradient of the weights."""
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        x, _, _ = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
        gy = tile(p_gy + c0, t0, 0, T, g, d, TT, GB)
        top = tl.full((TT,), float("-inf"), tl.float32)
        total = tl.zeros((TT,), tl.float32)
        along = tl.zeros((TT,), tl.float32)
        for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
            logits = _logits(x, _kept(p_n, k0, KB, GB), k0, k, SCALE, TYPE, PRECISION, KB)
            gl = product(gy, tl.trans(_kept(p_o, k0, KB, GB)), TYPE, PRECISION)  # [TT, KB]
            higher = tl.maximum(top, tl.max(logits, 1))
            share = tl.exp(logits - higher[:, None])
            before = tl.exp(top - higher)
            total = total * before + tl.sum(share, 1)
            along = along * before + tl.sum(share * gl, 1)
            top = higher
        t = t0 + tl.arange(0, TT)
        tl.store(p_stats + 2 * T + t, top, mask=t < T)
        tl.store(p_stats + 3 * T + t, total, mask=t < T)
        tl.store(p_stats + 4 * T + t, along / total, mask=t < T)
    tl.debug_barrier()


@triton.jit
def _weights_and_gradient(
    x,
    gy,
    n,
    o,
    p_stats,
    t0,
    k0,
    T: tl.constexpr,
    k: tl.constexpr,
    SCALE: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    KB: tl.constexpr,
):
    """Softmax of tokens t0 on over rows k0 on, and the gradient of `x N^T` in them."""
    gl = product(gy, tl.trans(o), TYPE, PRECISION)  # [TT, KB]
    if k <= KB:
        share = _softmax(x, n, k, SCALE, TYPE, PRECISION, KB)
        along = tl.sum(share * gl, 1)
    else:
        t = t0 + tl.arange(0, TT)
        logits = _logits(x, n, k0, k, SCALE, TYPE, PRECISION, KB)
        top = tl.load(p_stats + 2 * T + t, mask=t < T, other=0.0)
        total = tl.load(p_stats + 3 * T + t, mask=t < T, other=1.0)
        along = tl.load(p_stats + 4 * T + t, mask=t < T, other=0.0)
        share = tl.exp(logits - top[:, None]) / total[:, None]
    return share, share * (gl - along[:, None]) * SCALE


def _backward_sample(
    s,
    p_gy,
    p_x,
    p_wq,
    p_wk,
    p_wv,
    p_wo,
    p_pk,
    p_pv,
    p_nw,
    p_nb,
    p_gn,
    p_stats,
    p_room,
    p_gwq,
    p_gwk,
    p_gwv,
    p_gwo,
    p_gpk,
    p_gpv,
    p_gnw,
    p_gnb,
    T: tl.constexpr,
    d: tl.constexpr,
    G: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    GX: tl.constexpr,
    GW: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    """One sample of one group: gradient in x, and what it adds to the program's sums for the weights.

    k_len goes in chunks of KB rows; what a later pass needs of them lies in the program's room.
    """
    TYPE: tl.constexpr = p_x.dtype.element_ty
    ROWS: tl.constexpr = (k + KB - 1) // KB * KB
    group = tl.program_id(0) % G
    program = tl.program_id(0) // G
    part = tl.program_id(0).to(tl.int64)
    c0 = group * g
    p_wq += group * a * g
    p_wk += group * a * g
    p_wv += group * g * g
    p_wo += group * g * g
    p_pk += group * T * k
    p_pv += group * T * k
    p_stats += part * 5 * T
    # matrices of ROWS rows: the gradients of R_k and R_v take the places of these
    p_rk = p_room + part * ROWS * (5 * GB + AB)
    p_rv = p_rk + ROWS * GB
    p_n = p_rv + ROWS * GB
    p_o = p_n + ROWS * GB
    p_values = p_o + ROWS * GB
    p_keys = p_values + ROWS * GB
    at = tl.cast(s, tl.int64) * T * d
    p_x += at
    p_gy += at
    if NORM:
        # once a sample, in memory: the loops below then read numbers a token, not rows
        for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
            t = t0 + tl.arange(0, TT)
            mean, rstd = statistics(p_x, t0, T, d, EPS, TT, DB)
            tl.store(p_stats + t, mean, mask=t < T)
            tl.store(p_stats + T + t, rstd, mask=t < T)
        tl.debug_barrier()
    held = None
    if HELD:
        held = _hold(p_x, p_stats, c0, T, d, g, EPS, NORM, TT, GB, HELD)
    for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
        rk = tl.zeros((KB, GB), tl.float32)
        rv = tl.zeros((KB, GB), tl.float32)
        for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
            x, _, _ = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
            rk += product(tl.trans(tile(p_pk, t0, k0, T, k, k, TT, KB)), x, TYPE, PRECISION)
            rv += product(tl.trans(tile(p_pv, t0, k0, T, k, k, TT, KB)), x, TYPE, PRECISION)
        keys = product(rk, tl.trans(tile(p_wk, 0, 0, a, g, g, AB, GB)), TYPE, PRECISION)  # [KB, AB]
        tl.debug_barrier()
        n = product(keys, tile(p_wq, 0, 0, a, g, g, AB, GB), TYPE, PRECISION)  # [KB, GB]
        _keep(p_rk, rk, k0, KB, GB)
        _keep(p_keys, keys, k0, KB, AB)
        _keep(p_n, n, k0, KB, GB)
        tl.debug_barrier()
        values = product(rv, tl.trans(tile(p_wv, 0, 0, g, g, g, GB, GB)), TYPE, PRECISION)  # [KB, GB]
        tl.debug_barrier()
        o = product(values, tl.trans(tile(p_wo, 0, 0, g, g, g, GB, GB)), TYPE, PRECISION)  # [KB, GB]
        _keep(p_rv, rv, k0, KB, GB)
        _keep(p_values, values, k0, KB, GB)
        _keep(p_o, o, k0, KB, GB)
    tl.debug_barrier()
    if k > KB:
        _softmax_statistics(
            p_x, held, p_gy, p_nw, p_nb, p_n, p_o, p_stats, c0,
            T, d, g, k, EPS, SCALE, NORM, TYPE, PRECISION, TT, DB, GB, KB, HELD,
        )  # fmt: skip

    for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
        go = tl.zeros((KB, GB), tl.float32)
        gn = tl.zeros((KB, GB), tl.float32)
        for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
            x, _, _ = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
            gy = tile(p_gy + c0, t0, 0, T, g, d, TT, GB)  # [TT, GB]
            n, o = _kept(p_n, k0, KB, GB), _kept(p_o, k0, KB, GB)
            share, gl = _weights_and_gradient(
                x, gy, n, o, p_stats, t0, k0, T, k, SCALE, TYPE, PRECISION, TT, KB
            )
            go += product(tl.trans(share), gy, TYPE, PRECISION)
            gn += product(tl.trans(gl), x, TYPE, PRECISION)
        tl.debug_barrier()
        gvalues = product(go, tile(p_wo, 0, 0, g, g, g, GB, GB), TYPE, PRECISION)  # [KB, GB]
        if GW:
            tl.debug_barrier()
            gwo = product(tl.trans(go), _kept(p_values, k0, KB, GB), TYPE, PRECISION)
            accumulate(p_gwo + part * g * g, gwo, (s == program) & (k0 == 0), 0, 0, g, g, g, GB, GB)
            tl.debug_barrier()
            gwv = product(tl.trans(gvalues), _kept(p_rv, k0, KB, GB), TYPE, PRECISION)
            accumulate(p_gwv + part * g * g, gwv, (s == program) & (k0 == 0), 0, 0, g, g, g, GB, GB)
        tl.debug_barrier()
        grv = product(gvalues, tile(p_wv, 0, 0, g, g, g, GB, GB), TYPE, PRECISION)  # [KB, GB]
        _keep(p_rv, grv, k0, KB, GB)
        tl.debug_barrier()
        gkeys = product(gn, tl.trans(tile(p_wq, 0, 0, a, g, g, AB, GB)), TYPE, PRECISION)  # [KB, AB]
        if GW:
            tl.debug_barrier()
            gwq = product(tl.trans(_kept(p_keys, k0, KB, AB)), gn, TYPE, PRECISION)
            accumulate(p_gwq + part * a * g, gwq, (s == program) & (k0 == 0), 0, 0, a, g, g, AB, GB)
            tl.debug_barrier()
            gwk = product(tl.trans(gkeys), _kept(p_rk, k0, KB, GB), TYPE, PRECISION)
            accumulate(p_gwk + part * a * g, gwk, (s == program) & (k0 == 0), 0, 0, a, g, g, AB, GB)
        tl.debug_barrier()
        grk = product(gkeys, tile(p_wk, 0, 0, a, g, g, AB, GB), TYPE, PRECISION)  # [KB, GB]
        _keep(p_rk, grk, k0, KB, GB)
        tl.debug_barrier()

    gnw = tl.zeros((1, GB), tl.float32)
    gnb = tl.zeros((1, GB), tl.float32)
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        x, plain, _ = _tokens(p_x, held, p_nw, p_nb, t0, c0, T, d, g, p_stats, EPS, NORM, TT, DB, GB, HELD)
        gx = tl.zeros((TT, GB), tl.float32)
        for k0 in tl.range(0, k, KB, loop_unroll_factor=1, num_stages=1):
            if GX or NORM:
                gy = tile(p_gy + c0, t0, 0, T, g, d, TT, GB)  # [TT, GB]
                n, o = _kept(p_n, k0, KB, GB), _kept(p_o, k0, KB, GB)
                share, gl = _weights_and_gradient(
                    x, gy, n, o, p_stats, t0, k0, T, k, SCALE, TYPE, PRECISION, TT, KB
                )
                gx += product(gl, n, TYPE, PRECISION)
            grk, grv = _kept(p_rk, k0, KB, GB), _kept(p_rv, k0, KB, GB)
            if GX or NORM:
                gx += product(tile(p_pk, t0, k0, T, k, k, TT, KB), grk, TYPE, PRECISION)
                gx += product(tile(p_pv, t0, k0, T, k, k, TT, KB), grv, TYPE, PRECISION)
            if GW:
                gpk = product(x, tl.trans(grk), TYPE, PRECISION)  # [TT, KB]
                accumulate(p_gpk + part * T * k, gpk, s == program, t0, k0, T, k, k, TT, KB)
                gpv = product(x, tl.trans(grv), TYPE, PRECISION)  # [TT, KB]
                accumulate(p_gpv + part * T * k, gpv, s == program, t0, k0, T, k, k, TT, KB)
        if NORM:
            gnw += tl.sum(gx * plain, 0)[None, :]
            gnb += tl.sum(gx, 0)[None, :]
        if GX:
            store_tile(p_gn + at + c0, gx, t0, 0, T, g, d, TT, GB)
    if NORM and GW:
        accumulate(p_gnw + part * g, gnw, s == program, 0, 0, 1, g, g, 1, GB)
        accumulate(p_gnb + part * g, gnb, s == program, 0, 0, 1, g, g, 1, GB)
    # what threads of this program wrote is seen by all of them
    tl.debug_barrier()


# inlined into the loop over samples, ptxas keeps the addresses of every tile in registers across it; but
# tensor memory, which sm_100 takes for products of 64 rows and more, is for kernels alone
_backward_sample_inline = triton.jit(_backward_sample)
_backward_sample = triton.jit(_backward_sample, noinline=True)


@triton.jit
def projected_attention_bwd_kernel(
    p_gy,
    p_x,
    p_wq,
    p_wk,
    p_wv,
    p_wo,
    p_pk,
    p_pv,
    p_nw,
    p_nb,
    p_gn,
    p_gx,
    p_stats,
    p_room,
    p_ticket,
    p_gwq,
    p_gwk,
    p_gwv,
    p_gwo,
    p_gpk,
    p_gpv,
    p_gnw,
    p_gnb,
    B,
    P,
    T: tl.constexpr,
    d: tl.constexpr,
    G: tl.constexpr,
    g: tl.constexpr,
    a: tl.constexpr,
    k: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    GX: tl.constexpr,
    GW: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    GB: tl.constexpr,
    AB: tl.constexpr,
    KB: tl.constexpr,
    HELD: tl.constexpr,
):
    for s in tl.range(tl.program_id(0) // G, B, P, loop_unroll_factor=1, num_stages=1):
        if SPLIT:
            _backward_sample(
                s, p_gy, p_x, p_wq, p_wk, p_wv, p_wo, p_pk, p_pv, p_nw, p_nb, p_gn,
                p_stats, p_room, p_gwq, p_gwk, p_gwv, p_gwo, p_gpk, p_gpv, p_gnw, p_gnb,
                T, d, G, g, a, k, EPS, SCALE, NORM, GX, GW, PRECISION, TT, DB, GB, AB, KB, HELD,
            )  # fmt: skip
        else:
            _backward_sample_inline(
                s, p_gy, p_x, p_wq, p_wk, p_wv, p_wo, p_pk, p_pv, p_nw, p_nb, p_gn,
                p_stats, p_room, p_gwq, p_gwk, p_gwv, p_gwo, p_gpk, p_gpv, p_gnw, p_gnb,
                T, d, G, g, a, k, EPS, SCALE, NORM, GX, GW, PRECISION, TT, DB, GB, AB, KB, HELD,
            )  # fmt: skip
        if NORM and GX:
            at = tl.cast(s, tl.int64) * T * d
            norm_backward(p_ticket + s, G, p_gn + at, p_x + at, p_gy + at, p_nw, p_gx + at, T, d, EPS, TT, DB)


def whole_chunks(k: int, chunk: int) -> int:
    """Rows that whole chunks of k_len have."""
    return -(-k // chunk) * chunk


def _held(T: int, TT: int, GB: int, numbers: int) -> int:
    """Tiles of a group's tokens that a program keeps where it has room for them; none where not."""
    tiles = block(-(-T // TT), 1) if T else 0
    return tiles if tiles * TT * GB <= numbers else 0


def forward_blocks(T: int, d: int, g: int, a: int, k: int) -> tuple[dict[str, int], int]:
    """Tile sizes and warps of the forward.

    32 tokens, so that no product unrolls more than 32 terms in registers, 16 of wide groups; two warps, since
    with k_len and g of 32 rows a third would repeat the others' work; more where widths, k_len or the tokens
    that are kept are larger. k_len goes in chunks where its rows, of that width, would not stay in registers.
    """
    GB, AB = block(g), block(a)
    wide = max(GB, AB) > 32
    rows = max(CHUNK, 2048 // max(GB, AB // 2))
    KB, TT = min(block(k), CHUNK) if block(k) > rows else block(k), 16 if wide else 32
    warps = max(8 if wide else 2 if KB <= 32 else 4, min(8, T * GB // 1024))
    sizes = {"TT": min(block(T), TT), "DB": min(block(d), 32), "GB": GB, "AB": AB, "KB": KB}
    return sizes | {"HELD": _held(T, sizes["TT"], GB, 32 * warps * HELD)}, warps


def _backward_blocks(T: int, d: int, g: int, a: int, k: int) -> tuple[dict[str, int], int]:
    """Of the backward: chunks of k_len, and 16 tokens: for 32 of them a thread has too few registers."""
    GB, AB, KB = block(g), block(a), min(block(k), CHUNK)
    warps = 2 if max(GB, AB) <= 32 else 8
    sizes = {"TT": 16, "DB": min(block(d), 32), "GB": GB, "AB": AB, "KB": KB}
    return sizes | {"HELD": _held(T, 16, GB, 32 * warps * HELD_BACKWARD)}, warps


def projected_attention_launch(
    x: Tensor,
    wq: Tensor | Sequence[Tensor],
    wk: Tensor | Sequence[Tensor],
    wv: Tensor | Sequence[Tensor],
    wo: Tensor | Sequence[Tensor],
    pk: Tensor | Sequence[Tensor],
    pv: Tensor | Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> Launch:
    """The forward launch, into y; weights stacked over groups, or all of them lists of one tensor a group."""
    B, T, d = x.shape
    G, (a, g), k = len(wq), wq[0].shape, pk[0].shape[-1]
    blocks, warps = forward_blocks(T, d, g, a, k)
    weights = (wq, wk, wv, wo, pk, pv)
    tensors: dict[str, Any] = dict(
        zip(("p_wq", "p_wk", "p_wv", "p_wo", "p_pk", "p_pv"), weights, strict=True)
    )
    listed = not isinstance(wq, Tensor)
    if listed:
        tensors = {"weights": tuple(w for group in weights for w in group)}
    tensors |= {"p_nw": norm_weight, "p_nb": shift(norm_weight, norm_bias)}
    programs, room = B * G if T else 0, None
    if k > blocks["KB"]:
        room = x.new_empty((programs, 2, whole_chunks(k, blocks["KB"]), blocks["GB"]), dtype=torch.float32)
    return Launch(
        projected_attention_groups_fwd_kernel if listed else projected_attention_fwd_kernel,
        (programs,),
        {"p_x": x, **tensors, "p_room": room, "p_y": y},
        {
            **{"T": T, "d": d, "G": G, "g": g, "a": a, "k": k},
            "EPS": float(eps),
            "SCALE": a**-0.5,
            "NORM": norm_weight is not None,
            "PRECISION": precision(),
            **blocks,
        },
        num_warps=warps,
    )


def projected_attention_groups(
    x: Tensor,
    wq: Sequence[Tensor],
    wk: Sequence[Tensor],
    wv: Sequence[Tensor],
    wo: Sequence[Tensor],
    pk: Sequence[Tensor],
    pv: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """`projected_attention` of weights that are lists of one contiguous tensor a group, where they lie."""
    y = torch.empty_like(x)
    projected_attention_launch(x, wq, wk, wv, wo, pk, pv, norm_weight, norm_bias, eps, y).run()
    return y


def projected_attention(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    pk: Tensor,
    pv: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Projected attention of contiguous x `(B, T, d)`; with a norm `x + attention(LayerNorm(x))`.

    wq, wk `(G, a, g)`, wv, wo `(G, g, g)`, pk, pv `(G, T, k_len)`, all contiguous.
    """
    weights = (wq, wk, wv, wo, pk, pv, norm_weight, norm_bias)
    y = torch.empty_like(x)
    projected_attention_launch(x, *weights, eps, y).run()
    return y


def projected_attention_backward_launch(
    gy: Tensor,
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    pk: Tensor,
    pv: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gx: Tensor | None,
    want: bool,
) -> tuple[Launch, list[Tensor]]:
    """The backward launch, into gx where there is one, and into partial sums `(P, ...)` where wanted."""
    B, T, d = x.shape
    G, a, g = wq.shape
    k = pk.shape[-1]
    norm = norm_weight is not None
    blocks, warps = _backward_blocks(T, d, g, a, k)
    P = min(B, max(1, PROGRAMS // G))
    shapes = [w.shape for w in (wq, wk, wv, wo, pk, pv)] + ([(G, g)] * 2 if norm else [])
    partial = [x.new_empty((P, *shape), dtype=torch.float32) for shape in shapes] if want else []
    names = ("p_gwq", "p_gwk", "p_gwv", "p_gwo", "p_gpk", "p_gpv", "p_gnw", "p_gnb")
    arguments: dict[str, Tensor | int | None] = dict.fromkeys(names)
    arguments |= dict(zip(names, partial, strict=False))
    # the gradient of what the norm puts out waits for all groups, in float32
    wait = norm and gx is not None
    scratch = torch.empty_like(x, dtype=torch.float32) if wait and x.dtype != torch.float32 else gx
    ticket = torch.zeros(B, dtype=torch.int32, device=x.device) if wait else None
    arguments |= {"p_wq": wq, "p_wk": wk, "p_wv": wv, "p_wo": wo, "p_pk": pk, "p_pv": pv}
    arguments |= {"p_nw": norm_weight, "p_nb": shift(norm_weight, norm_bias)}
    arguments |= {"p_gn": scratch, "p_gx": gx, "p_ticket": ticket}
    arguments["p_stats"] = x.new_empty((P * G, 5, T), dtype=torch.float32)
    room = (P * G, whole_chunks(k, blocks["KB"]), 5 * blocks["GB"] + blocks["AB"])
    arguments["p_room"] = x.new_empty(room, dtype=torch.float32)
    launch = Launch(
        projected_attention_bwd_kernel,
        (P * G if T else 0,),
        {"p_gy": gy, "p_x": x, **arguments, "B": B, "P": P},
        {
            **{"T": T, "d": d, "G": G, "g": g, "a": a, "k": k},
            "EPS": float(eps),
            "SCALE": a**-0.5,
            "NORM": norm,
            "GX": gx is not None,
            "GW": want,
            "PRECISION": precision(),
            "SPLIT": max(blocks["GB"], blocks["AB"]) <= 32,
            **blocks,
        },
        num_warps=warps,
        registers=255,
    )
    return launch, partial


def projected_attention_backward(
    gy: Tensor,
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    pk: Tensor,
    pv: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gx: bool,
    gw: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the eight weights in the forward's order; those not wanted are empty.

    The gradients of weights are sums over samples: each program of a group adds its own in their order, and
    one reduction adds the programs.
    """
    weights = (wq, wk, wv, wo, pk, pv, norm_weight, norm_bias)
    grad = torch.empty_like(x) if gx else None
    if gx or gw:
        launch, partial = projected_attention_backward_launch(gy, x, *weights, eps, grad, gw)
        launch.run()
    else:
        partial = []
    found = [
        p.sum(0).to(w.dtype).view(w.shape) for p, w in zip(partial, weights, strict=False) if w is not None
    ]
    found += [x.new_empty(0) for _ in range(len(weights) - len(found))]
    return (x.new_empty(0) if grad is None else grad, *found)
