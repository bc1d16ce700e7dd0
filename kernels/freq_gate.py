"""The axial frequency gate: spectrum, statistics, perceptrons, gate and inverse in one program a sample.

Sides of 8, 16, 32, 64 and 128 take radix passes (`fft.py`): the sample stays in registers from its one load
to the one store, twelve exchanges of a plane by way of shared memory between the passes, and the statistics
and the gate see the frequencies in the order that the passes leave. Counted for a sample of 64x64 on an
H200, both transforms: radix-2 butterflies 0.49 Mflop, 15 ns at the half rate of plain additions (as compiled
9 ns), exchanges 13 ns of shared memory, H and Hd 15 ns of memory. Products with DFT matrices take 51 ns with
tf32x3 and 17 ns with tf32; factored 8 x 8 on the tensor cores a quarter of that, 13 ns with tf32x3 and 6 ns
more to split its operands. So the passes are the cheapest at the highest precision; below it memory binds
them all, and the passes stay exact (`benchmarks/bench_freq_gate.py` prints the count). The backward holds
both spectra in registers up to 64x64; above, they wait in memory while the gate's gradient is taken.

Other sides, 63 as well as 100, are products with DFT matrices, tables in L2, as real products of interleaved
rows. Two products a transform, each of rows with a table on their right: the first of the spectrum and the
first of its inverse store their tile transposed, so that the other axis becomes rows. Operands come from
global memory (L2) a chunk of K at a time and intermediates go there, to the output's own memory and a
scratch a program, so that registers do not grow with the size. Sizes are constants of the kernel: masks and
addresses fold, and they belong to the model. Samples above 128 take the library's FFT, since products grow
as M N (M + N) (at 256x256 3.3 us of an H200 a sample, against 0.8 us for the seven passes over memory), and
one kernel on the spectrum: statistics, gate and, backward, the spectrum's gradient.

Backward, with Z the spectrum, G the gate, D = Z G, and a spectrum's gradient the FFT of its channel's:
`gG = Re(conj(Z) gD)`, `gl = gG G (1 - G) / T`, its row and column sums through the perceptrons to `g_rho`
and `g_kappa`, `gZ = G gD + (g_rho_m / N + g_kappa_n / M) Z / |Z|`, the last term 0 at |Z| = 0. With the norm
folded in (Z of H / |H|) `gH = IFFT2((gZ - <Z, gZ> Z) / |H| + g_norm Z)`, and
`<Z, gZ> = sum(G gG) + g_rho . rho + g_kappa . kappa`. What the weights' gradients need is a few vectors a
sample; the sums over samples are four products of those.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import interleave, load_rows, load_transposed, planes, store_rows, store_swapped
from .dual_view import dual_view_project, fold, project_sample, projection_blocks, row_table
from .fft import FACTORS, inverse_transform, load_sample, store_sample, transform, twiddle_table
from .launch import Launch, block, precision

# the largest side that is transformed on chip
LARGEST = 128
# programs of the products, which keep a scratch each: at 63x63 32 KiB, all of them in L2
PROGRAMS = 512
# frequencies of a sample up to which the factored backward holds two spectra in registers
HELD = 4096
# a bin of at most this share of the norm is rounding of a zero: its magnitude has subgradient 0, as at zero
ROUNDING = tl.constexpr(2.0**-21)


@functools.lru_cache(maxsize=64)
def dft_table(n: int, device: torch.device) -> Tensor:
    """`T (2n, 2n)`, `x T` the orthonormal DFT of interleaved rows x, `x T^T` its inverse; from float64."""
    with torch.inference_mode(False), torch.no_grad():
        j = torch.arange(n)
        angle = (j[:, None] * j[None, :] % n).double() * (-2 * math.pi / n)
        re, im = angle.cos() / math.sqrt(n), angle.sin() / math.sqrt(n)
        table = torch.stack([torch.stack([re, im], -1), torch.stack([-im, re], -1)], 1)
        return table.reshape(2 * n, 2 * n).float().to(device)


@triton.jit
def load_dft(p_t, width, k0, INVERSE: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from k0 on of a DFT's table, or of its transpose."""
    if INVERSE:
        t = load_transposed(p_t, width, k0, 0, width, width, INNER, COLUMNS)
    else:
        t = load_rows(p_t, width, width, k0 + tl.arange(0, INNER), 0, width, COLUMNS)
    return t


@triton.jit
def transform_rows(
    p_a,
    p_t,
    rows,
    width,
    i0,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The DFT along rows i0 to i0 + ROWS of an interleaved (rows, width) matrix in memory."""
    i = i0 + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    # a rolled loop: with all of K unrolled the split operands of tf32x3 do not fit the registers
    for k0 in tl.range(0, width, INNER, num_stages=1, loop_unroll_factor=1):
        a = load_rows(p_a, width, width, i, k0, rows, INNER)  # [R, K]
        t = load_dft(p_t, width, k0, INVERSE, INNER, WIDTH)  # [K, C]
        acc = tl.dot(a, t, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def transform_and_swap(
    p_h,
    p_t,
    p_a,
    M,
    N,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The DFT along the rows of an (M, N, 2) matrix, transposed (N, M, 2)."""
    for i0 in range(0, M, ROWS):
        y = transform_rows(p_h, p_t, M, 2 * N, i0, False, ROWS, INNER, WIDTH, PRECISION)
        store_swapped(p_a, y, M, N, i0, ROWS, WIDTH // 2)
    tl.debug_barrier()


@triton.jit
def inverse_in_place(
    p_a, p_t, M, N, ROWS: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):
    """The inverse DFT along the rows of an (M, N, 2) matrix."""
    for i0 in range(0, M, ROWS):
        x = transform_rows(p_a, p_t, M, 2 * N, i0, True, ROWS, INNER, WIDTH, PRECISION)
        # these rows have been read by all threads before any writes them
        tl.debug_barrier()
        store_rows(p_a, x, 2 * N, 2 * N, i0 + tl.arange(0, ROWS), 0, M, WIDTH)
    tl.debug_barrier()


@triton.jit
def matvec(
    p_w,
    p_x,
    p_y,
    p_mask,
    n_out,
    n_in,
    s_out,
    s_in,
    RELU: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """`y = W x / T`, W by its strides; with RELU zero where y, or the mask if there is one, is at most 0."""
    for i0 in range(0, n_out, OUT):
        i = i0 + tl.arange(0, OUT)
        y = tl.zeros((OUT,), tl.float32)
        for k0 in range(0, n_in, IN):
            k = k0 + tl.arange(0, IN)
            x = tl.load(p_x + k, mask=k < n_in, other=0.0)  # [K]
            mask = (i[:, None] < n_out) & (k[None, :] < n_in)
            w = tl.load(p_w + i[:, None] * s_out + k[None, :] * s_in, mask=mask, other=0.0)  # [J, K]
            y += tl.sum(w * x[None, :], 1)
        if RELU:
            # NaN passes, as in torch
            if p_mask is None:
                y = tl.where(y <= 0, 0.0, y)
            else:
                y = tl.where(tl.load(p_mask + i, mask=i < n_out, other=0.0) <= 0, 0.0, y)
        tl.store(p_y + i, y / TEMPERATURE, mask=i < n_out)  # [J]
    tl.debug_barrier()


@triton.jit
def scale_vector(p, n, scale, IN: tl.constexpr):
    tl.debug_barrier()
    for k0 in range(0, n, IN):
        k = k0 + tl.arange(0, IN)
        tl.store(p + k, tl.load(p + k, mask=k < n, other=0.0) * scale, mask=k < n)  # [K]
    tl.debug_barrier()


@triton.jit
def dot_vectors(p_x, p_y, n, IN: tl.constexpr):
    total = tl.zeros((IN,), tl.float32)
    for k0 in range(0, n, IN):
        k = k0 + tl.arange(0, IN)
        x = tl.load(p_x + k, mask=k < n, other=0.0)  # [K]
        total += x * tl.load(p_y + k, mask=k < n, other=0.0)  # [K]
    return tl.sum(total, 0)


@triton.jit
def means_and_logits(
    p_v,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    square,
    M,
    N,
    HR,
    HC,
    NORMALIZE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """From sums of magnitudes to means and both perceptrons' logits, divided by T; the norm and its inverse.

    p_v holds rho (M), kappa (N), the hidden layers (HR), (HC), and the logits (M), (N).
    """
    norm = tl.sqrt_rn(square)
    inverse = 1.0
    if NORMALIZE:
        inverse = 1.0 / tl.where(norm == 0, 1.0, norm)
    p_hr = p_v + M + N
    p_lr = p_hr + HR + HC
    scale_vector(p_v, M, inverse / N, IN)
    scale_vector(p_v + M, N, inverse / M, IN)
    matvec(p_r1, p_v, p_hr, None, HR, M, M, 1, True, 1.0, OUT, IN)
    matvec(p_c1, p_v + M, p_hr + HR, None, HC, N, N, 1, True, 1.0, OUT, IN)
    matvec(p_r2, p_hr, p_lr, None, M, HR, HR, 1, False, TEMPERATURE, OUT, IN)
    matvec(p_c2, p_hr + HR, p_lr + M, None, N, HC, HC, 1, False, TEMPERATURE, OUT, IN)
    return norm, inverse


@triton.jit
def means_gradient(
    p_v,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    M,
    N,
    HR,
    HC,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """From sums of the logits' gradients to those of rho and kappa; returns rho . g_rho + kappa . g_kappa.

    p_v goes on after the logits: gradients of the outputs (M), (N), of the hidden layers (HR), (HC), of the
    means (M), (N).
    """
    p_hr = p_v + M + N
    p_ar = p_hr + HR + HC + M + N
    p_gr = p_ar + M + N
    p_er = p_gr + HR + HC
    scale_vector(p_ar, M + N, 1.0 / TEMPERATURE, IN)
    matvec(p_r2, p_ar, p_gr, p_hr, HR, M, 1, HR, True, 1.0, OUT, IN)
    matvec(p_c2, p_ar + M, p_gr + HR, p_hr + HR, HC, N, 1, HC, True, 1.0, OUT, IN)
    matvec(p_r1, p_gr, p_er, None, M, HR, 1, M, False, 1.0, OUT, IN)
    matvec(p_c1, p_gr + HR, p_er + M, None, N, HC, 1, N, False, 1.0, OUT, IN)
    return dot_vectors(p_v, p_er, M + N, IN)


@triton.jit
def outer_sum(p_row, p_column, M, N, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = i0 + tl.arange(0, ROWS)
    j = j0 + tl.arange(0, COLUMNS)
    row = tl.load(p_row + i, mask=i < M, other=0.0)  # [R]
    column = tl.load(p_column + j, mask=j < N, other=0.0)  # [C]
    return row[:, None] + column[None, :]


@triton.jit
def gate_gradient(zr, zi, gr, gi, gate):
    """Terms of <D, gD> and of the logits' gradient, and G gD."""
    d = (zr * gr + zi * gi) * gate
    return d, d * (1 - gate), gr * gate, gi * gate


@triton.jit
def spectrum_gradient(zr, zi, pr, pi, g_magnitude, inverse, radial, least):
    """`inverse * (G gD + g_magnitude Z / |Z|) + radial Z`, no direction where |Z| is at most `least`."""
    magnitude = tl.sqrt_rn(zr * zr + zi * zi)
    zero = magnitude <= least
    along = tl.where(zero, 0.0, g_magnitude / tl.where(zero, 1.0, magnitude))
    along = inverse * along + radial
    return inverse * pr + along * zr, inverse * pi + along * zi


@triton.jit
def spectrum_tiles(
    p_h,
    p_tm,
    p_tn,
    p_a,
    p_z,
    p_v,
    M,
    N,
    ROWS_M: tl.constexpr,
    ROWS_N: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The spectrum, transposed (N, M, 2), by way of p_a; sums of its magnitudes and of its squares."""
    transform_and_swap(p_h, p_tn, p_a, M, N, ROWS_M, INNER, WIDTH_N, PRECISION)
    j = tl.arange(0, WIDTH_M // 2)
    rho = tl.zeros((WIDTH_M // 2,), tl.float32)
    square = tl.zeros((WIDTH_M // 2,), tl.float32)
    for i0 in range(0, N, ROWS_N):
        i = i0 + tl.arange(0, ROWS_N)
        z = transform_rows(p_a, p_tm, N, 2 * M, i0, False, ROWS_N, INNER, WIDTH_M, PRECISION)
        store_rows(p_z, z, 2 * M, 2 * M, i, 0, N, WIDTH_M)
        re, im = planes(z, ROWS_N, WIDTH_M // 2)
        power = re * re + im * im
        magnitude = tl.sqrt_rn(power)
        tl.store(p_v + M + i, tl.sum(magnitude, 1), mask=i < N)  # [R]
        rho += tl.sum(magnitude, 0)
        square += tl.sum(power, 0)
    tl.store(p_v + j, rho, mask=j < M)  # [C]
    tl.debug_barrier()
    return tl.sum(square, 0)


@triton.jit
def freq_gate_fwd_kernel(
    p_h,
    p_tm,
    p_tn,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_z,
    p_v,
    p_hd,
    p_norms,
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
    HR: tl.constexpr,
    HC: tl.constexpr,
    d: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PROJECT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS_M: tl.constexpr,
    ROWS_N: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    P_ROWS: tl.constexpr,
    P_INNER: tl.constexpr,
    P_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    p_z += program * (M * N * 2)
    p_v += program * (2 * M + 2 * N + HR + HC)
    p_lr = p_v + M + N + HR + HC
    if PROJECT:
        p_s += program * (M // 2) * d
    for b in range(program, B, tl.num_programs(0)):
        offset = b * (M * N * 2)
        p_a = p_hd + offset
        square = spectrum_tiles(
            p_h + offset, p_tm, p_tn, p_a, p_z, p_v, M, N, ROWS_M, ROWS_N, INNER, WIDTH_M, WIDTH_N, PRECISION
        )
        norm, inverse = means_and_logits(
            p_v, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
        )
        if NORMALIZE:
            tl.store(p_norms + b, norm)
        for i0 in range(0, N, ROWS_N):
            i = i0 + tl.arange(0, ROWS_N)
            x = tl.zeros((ROWS_N, WIDTH_M), tl.float32)
            for k0 in tl.range(0, M, INNER // 2, num_stages=1, loop_unroll_factor=1):
                z = load_rows(p_z, 2 * M, 2 * M, i, 2 * k0, N, INNER)  # [R, K]
                re, im = planes(z, ROWS_N, INNER // 2)
                gate = inverse * tl.sigmoid(outer_sum(p_lr + M, p_lr, N, M, i0, k0, ROWS_N, INNER // 2))
                z = interleave(re * gate, im * gate, ROWS_N, INNER // 2)
                t = load_dft(p_tm, 2 * M, 2 * k0, True, INNER, WIDTH_M)  # [K, C]
                x = tl.dot(z, t, acc=x, input_precision=PRECISION)
            store_swapped(p_a, x, N, M, i0, ROWS_N, WIDTH_M // 2)
        tl.debug_barrier()
        inverse_in_place(p_a, p_tn, M, N, ROWS_M, INNER, WIDTH_N, PRECISION)
        if PROJECT:
            project_sample(
                p_a,
                p_w,
                p_bias,
                p_pos,
                p_low,
                p_share,
                p_s,
                p_x + b * (M * d),
                M,
                N,
                d,
                P_ROWS,
                P_INNER,
                P_COLUMNS,
                PRECISION,
            )


@triton.jit
def freq_gate_bwd_kernel(
    p_g,
    p_gnorms,
    p_h,
    p_tm,
    p_tn,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_z,
    p_v,
    p_gh,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    HR: tl.constexpr,
    HC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHANNEL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS_M: tl.constexpr,
    ROWS_N: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH_M: tl.constexpr,
    WIDTH_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    size = M * N * 2
    program = tl.program_id(0).to(tl.int64)
    p_z += program * (2 * size)
    p_p = p_z + size
    for b in range(program, B, tl.num_programs(0)):
        offset = b * size
        p_vb = p_v + b * (4 * M + 4 * N + 2 * HR + 2 * HC)
        p_lr = p_vb + M + N + HR + HC
        p_ar = p_lr + M + N
        p_er = p_ar + M + N + HR + HC
        p_a = p_gh + offset if CHANNEL else p_gh + program * size
        square = spectrum_tiles(
            p_h + offset, p_tm, p_tn, p_a, p_z, p_vb, M, N, ROWS_M, ROWS_N, INNER, WIDTH_M, WIDTH_N, PRECISION
        )
        norm, inverse = means_and_logits(
            p_vb, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
        )
        transform_and_swap(p_g + offset, p_tn, p_a, M, N, ROWS_M, INNER, WIDTH_N, PRECISION)
        columns = tl.zeros((WIDTH_M // 2,), tl.float32)
        along = tl.zeros((WIDTH_M // 2,), tl.float32)
        for i0 in range(0, N, ROWS_N):
            i = i0 + tl.arange(0, ROWS_N)
            g = transform_rows(p_a, p_tm, N, 2 * M, i0, False, ROWS_N, INNER, WIDTH_M, PRECISION)
            gr, gi = planes(g, ROWS_N, WIDTH_M // 2)
            zr, zi = planes(load_rows(p_z, 2 * M, 2 * M, i, 0, N, WIDTH_M), ROWS_N, WIDTH_M // 2)
            gate = tl.sigmoid(outer_sum(p_lr + M, p_lr, N, M, i0, 0, ROWS_N, WIDTH_M // 2))
            d, logit, gr, gi = gate_gradient(inverse * zr, inverse * zi, gr, gi, gate)
            tl.store(p_ar + M + i, tl.sum(logit, 1), mask=i < N)  # [R]
            columns += tl.sum(logit, 0)
            along += tl.sum(d, 0)
            store_rows(p_p, interleave(gr, gi, ROWS_N, WIDTH_M // 2), 2 * M, 2 * M, i, 0, N, WIDTH_M)
        j = tl.arange(0, WIDTH_M // 2)
        tl.store(p_ar + j, columns, mask=j < M)  # [C]
        tl.debug_barrier()
        parallel = tl.sum(along, 0)
        parallel += means_gradient(p_vb, p_r1, p_r2, p_c1, p_c2, M, N, HR, HC, TEMPERATURE, OUT, IN)
        if CHANNEL:
            radial = 0.0
            least = ROUNDING * norm * inverse
            if NORMALIZE:
                radial = -parallel * inverse
                if p_gnorms is not None:
                    radial += tl.load(p_gnorms + b)
            scale_vector(p_er, M, 1.0 / N, IN)
            scale_vector(p_er + M, N, 1.0 / M, IN)
            for i0 in range(0, N, ROWS_N):
                i = i0 + tl.arange(0, ROWS_N)
                x = tl.zeros((ROWS_N, WIDTH_M), tl.float32)
                for k0 in tl.range(0, M, INNER // 2, num_stages=1, loop_unroll_factor=1):
                    z = load_rows(p_z, 2 * M, 2 * M, i, 2 * k0, N, INNER)  # [R, K]
                    p = load_rows(p_p, 2 * M, 2 * M, i, 2 * k0, N, INNER)  # [R, K]
                    zr, zi = planes(z, ROWS_N, INNER // 2)
                    pr, pi = planes(p, ROWS_N, INNER // 2)
                    g_magnitude = outer_sum(p_er + M, p_er, N, M, i0, k0, ROWS_N, INNER // 2)
                    zr, zi = spectrum_gradient(
                        inverse * zr, inverse * zi, pr, pi, g_magnitude, inverse, radial, least
                    )
                    t = load_dft(p_tm, 2 * M, 2 * k0, True, INNER, WIDTH_M)  # [K, C]
                    x = tl.dot(interleave(zr, zi, ROWS_N, INNER // 2), t, acc=x, input_precision=PRECISION)
                store_swapped(p_a, x, N, M, i0, ROWS_N, WIDTH_M // 2)
            tl.debug_barrier()
            inverse_in_place(p_a, p_tn, M, N, ROWS_M, INNER, WIDTH_N, PRECISION)


@triton.jit
def frequencies(M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Row frequencies [M2, M1] and column frequencies [N] of the planes that `transform` leaves."""
    i = M1 * tl.arange(0, M2)[:, None] + tl.arange(0, M1)[None, :]
    q = tl.arange(0, N1 * N2)
    return i, q // N2 + N1 * (q % N2)


@triton.jit
def store_sums(x, p, i, j, M):
    """Sums of a plane over column frequencies, to p, and over row frequencies, M numbers on."""
    tl.store(p + i, tl.sum(x, 2))  # [M2, M1]
    tl.store(p + M + j, tl.sum(tl.sum(x, 0), 0))  # [N]


@triton.jit
def load_sum(p, i, j, M):
    """Row's and column's number, added: a plane [M2, M1, N]."""
    row, column = tl.load(p + i), tl.load(p + M + j)
    return row[:, :, None] + column[None, None, :]


@triton.jit
def load_planes(p, M1: tl.constexpr, M2: tl.constexpr, N: tl.constexpr):
    q = (tl.arange(0, M2)[:, None, None] * M1 + tl.arange(0, M1)[None, :, None]) * (2 * N)
    x = tl.load(p + q + tl.arange(0, 2 * N)[None, None, :])  # [M2, M1, 2 N]
    return tl.split(tl.reshape(x, (M2, M1, N, 2)))


@triton.jit
def store_planes(p, r, i, M1: tl.constexpr, M2: tl.constexpr, N: tl.constexpr):
    q = (tl.arange(0, M2)[:, None, None] * M1 + tl.arange(0, M1)[None, :, None]) * (2 * N)
    x = tl.reshape(tl.join(r, i), (M2, M1, 2 * N))
    tl.store(p + q + tl.arange(0, 2 * N)[None, None, :], x)  # [M2, M1, 2 N]


@triton.jit
def factored_spectrum(
    p_h,
    p_wm,
    p_wn,
    p_v,
    SCALE: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """The spectrum of a sample, divided by SCALE; sums of its magnitudes, and of its squares."""
    zr, zi = load_sample(p_h, M1, M2, N1, N2)
    zr, zi = transform(zr, zi, p_wm, p_wn, M1, M2, N1, N2)
    i, j = frequencies(M1, M2, N1, N2)
    power = (SCALE * zr) * (SCALE * zr) + (SCALE * zi) * (SCALE * zi)
    store_sums(tl.sqrt_rn(power), p_v, i, j, M1 * M2)
    return zr, zi, tl.sum(tl.sum(tl.sum(power, 2), 1), 0)


@triton.jit
def factored_gate_fwd_kernel(
    p_h,
    p_wm,
    p_wn,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_v,
    p_hd,
    p_norms,
    p_w,
    p_bias,
    p_pos,
    p_low,
    p_share,
    p_s,
    p_x,
    M1: tl.constexpr,
    M2: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    HR: tl.constexpr,
    HC: tl.constexpr,
    d: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PROJECT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    P_ROWS: tl.constexpr,
    P_INNER: tl.constexpr,
    P_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M: tl.constexpr = M1 * M2
    N: tl.constexpr = N1 * N2
    b = tl.program_id(0).to(tl.int64)
    p_v += b * (2 * M + 2 * N + HR + HC)
    p_lr = p_v + M + N + HR + HC
    if PROJECT:
        p_s += b * (M // 2) * d
    i, j = frequencies(M1, M2, N1, N2)
    offset = b * (M * N * 2)
    zr, zi, square = factored_spectrum(p_h + offset, p_wm, p_wn, p_v, SCALE, M1, M2, N1, N2)
    norm, inverse = means_and_logits(
        p_v, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
    )
    if NORMALIZE:
        tl.store(p_norms + b, norm)
    gate = (SCALE * SCALE) * inverse * tl.sigmoid(load_sum(p_lr, i, j, M))
    zr, zi = inverse_transform(zr * gate, zi * gate, p_wm, p_wn, M1, M2, N1, N2)
    store_sample(p_hd + offset, zr, zi, M1, M2, N1, N2)
    if PROJECT:
        tl.debug_barrier()
        project_sample(
            p_hd + offset,
            p_w,
            p_bias,
            p_pos,
            p_low,
            p_share,
            p_s,
            p_x + b * (M * d),
            M,
            N,
            d,
            P_ROWS,
            P_INNER,
            P_COLUMNS,
            PRECISION,
        )


@triton.jit
def factored_gate_bwd_kernel(
    p_g,
    p_gnorms,
    p_h,
    p_wm,
    p_wn,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_z,
    p_v,
    p_gh,
    M1: tl.constexpr,
    M2: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    HR: tl.constexpr,
    HC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHANNEL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """Both spectra stay in registers, with HELD, or else in memory while the gate's gradient is taken."""
    M: tl.constexpr = M1 * M2
    N: tl.constexpr = N1 * N2
    b = tl.program_id(0).to(tl.int64)
    i, j = frequencies(M1, M2, N1, N2)
    offset = b * (M * N * 2)
    p_p = p_gh + offset
    if not HELD:
        p_z += offset
    p_vb = p_v + b * (4 * M + 4 * N + 2 * HR + 2 * HC)
    p_lr = p_vb + M + N + HR + HC
    p_ar = p_lr + M + N
    p_er = p_ar + M + N + HR + HC
    zr, zi, square = factored_spectrum(p_h + offset, p_wm, p_wn, p_vb, SCALE, M1, M2, N1, N2)
    if not HELD:
        store_planes(p_z, zr, zi, M1, M2, N)
    norm, inverse = means_and_logits(
        p_vb, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
    )
    unit = SCALE * inverse
    gr, gi = load_sample(p_g + offset, M1, M2, N1, N2)
    gr, gi = transform(gr, gi, p_wm, p_wn, M1, M2, N1, N2)
    if HELD:
        gate = tl.sigmoid(load_sum(p_lr, i, j, M))
        along, logit, gr, gi = gate_gradient(unit * zr, unit * zi, SCALE * gr, SCALE * gi, gate)
        store_sums(logit, p_ar, i, j, M)
        parallel = tl.sum(tl.sum(tl.sum(along, 2), 1), 0)
    else:
        store_planes(p_p, gr, gi, M1, M2, N)
        tl.debug_barrier()
        columns = tl.zeros((N,), tl.float32)
        along = tl.zeros((N,), tl.float32)
        for k0 in range(0, M, ROWS):
            k = k0 + tl.arange(0, ROWS)
            xr, xi = planes(load_rows(p_z, 2 * N, 2 * N, k, 0, M, 2 * N), ROWS, N)
            pr, pi = planes(load_rows(p_p, 2 * N, 2 * N, k, 0, M, 2 * N), ROWS, N)
            gate = tl.sigmoid(tl.load(p_lr + k)[:, None] + tl.load(p_lr + M + j)[None, :])
            dot, logit, pr, pi = gate_gradient(unit * xr, unit * xi, SCALE * pr, SCALE * pi, gate)
            tl.store(p_ar + k, tl.sum(logit, 1))  # [R]
            columns += tl.sum(logit, 0)
            along += tl.sum(dot, 0)
            # these rows have been read by all threads before any writes them
            tl.debug_barrier()
            store_rows(p_p, interleave(pr, pi, ROWS, N), 2 * N, 2 * N, k, 0, M, 2 * N)
        tl.store(p_ar + M + j, columns)  # [N]
        parallel = tl.sum(along, 0)
    tl.debug_barrier()
    parallel += means_gradient(p_vb, p_r1, p_r2, p_c1, p_c2, M, N, HR, HC, TEMPERATURE, OUT, IN)
    if CHANNEL:
        radial = 0.0
        least = ROUNDING * norm * inverse
        if NORMALIZE:
            radial = -parallel * inverse
            if p_gnorms is not None:
                radial += tl.load(p_gnorms + b)
        radial *= SCALE
        scale_vector(p_er, M, 1.0 / N, IN)
        scale_vector(p_er + M, N, 1.0 / M, IN)
        if HELD:
            mean = load_sum(p_er, i, j, M)
            gr, gi = spectrum_gradient(unit * zr, unit * zi, gr, gi, mean, unit, radial, least)
        else:
            for k0 in range(0, M, ROWS):
                k = k0 + tl.arange(0, ROWS)
                xr, xi = planes(load_rows(p_z, 2 * N, 2 * N, k, 0, M, 2 * N), ROWS, N)
                pr, pi = planes(load_rows(p_p, 2 * N, 2 * N, k, 0, M, 2 * N), ROWS, N)
                mean = tl.load(p_er + k)[:, None] + tl.load(p_er + M + j)[None, :]
                xr, xi = spectrum_gradient(unit * xr, unit * xi, pr, pi, mean, unit, radial, least)
                tl.debug_barrier()
                store_rows(p_p, interleave(xr, xi, ROWS, N), 2 * N, 2 * N, k, 0, M, 2 * N)
            tl.debug_barrier()
            gr, gi = load_planes(p_p, M1, M2, N)
        gr, gi = inverse_transform(gr, gi, p_wm, p_wn, M1, M2, N1, N2)
        store_sample(p_gh + offset, gr, gi, M1, M2, N1, N2)


@triton.jit
def load_spectrum(p, M, N, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = load_rows(p, 2 * N, 2 * N, i0 + tl.arange(0, ROWS), 2 * j0, M, 2 * COLUMNS)  # [R, 2C]
    return planes(x, ROWS, COLUMNS)


@triton.jit
def store_spectrum(p, re, im, M, N, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = interleave(re, im, ROWS, COLUMNS)
    store_rows(p, x, 2 * N, 2 * N, i0 + tl.arange(0, ROWS), 2 * j0, M, 2 * COLUMNS)  # [R, 2C]


@triton.jit
def spectrum_sums(p_z, p_v, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the magnitudes of a spectrum in memory over rows and columns, and of its squares."""
    square = tl.zeros((COLUMNS,), tl.float32)
    for j0 in range(0, N, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        kappa = tl.zeros((COLUMNS,), tl.float32)
        for i0 in range(0, M, ROWS):
            i = i0 + tl.arange(0, ROWS)
            re, im = load_spectrum(p_z, M, N, i0, j0, ROWS, COLUMNS)
            power = re * re + im * im
            magnitude = tl.sqrt_rn(power)
            rho = tl.load(p_v + i, mask=(i < M) & (j0 > 0), other=0.0)  # [R]
            tl.store(p_v + i, rho + tl.sum(magnitude, 1), mask=i < M)  # [R]
            kappa += tl.sum(magnitude, 0)
            square += tl.sum(power, 0)
        tl.store(p_v + M + j, kappa, mask=j < N)  # [C]
        tl.debug_barrier()
    return tl.sum(square, 0)


@triton.jit
def spectral_gate_fwd_kernel(
    p_z,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_v,
    p_norms,
    M,
    N,
    HR,
    HC,
    NORMALIZE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gate on a spectrum of any size in memory, in place."""
    b = tl.program_id(0).to(tl.int64)
    p_z += b * M * N * 2
    p_v += b * (2 * M + 2 * N + HR + HC)
    p_lr = p_v + M + N + HR + HC
    square = spectrum_sums(p_z, p_v, M, N, ROWS, COLUMNS)
    norm, inverse = means_and_logits(
        p_v, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
    )
    if NORMALIZE:
        tl.store(p_norms + b, norm)
    for i0 in range(0, M, ROWS):
        for j0 in range(0, N, COLUMNS):
            re, im = load_spectrum(p_z, M, N, i0, j0, ROWS, COLUMNS)
            gate = inverse * tl.sigmoid(outer_sum(p_lr, p_lr + M, M, N, i0, j0, ROWS, COLUMNS))
            store_spectrum(p_z, re * gate, im * gate, M, N, i0, j0, ROWS, COLUMNS)


@triton.jit
def spectral_gate_bwd_kernel(
    p_g,
    p_gnorms,
    p_z,
    p_r1,
    p_r2,
    p_c1,
    p_c2,
    p_v,
    M,
    N,
    HR,
    HC,
    NORMALIZE: tl.constexpr,
    CHANNEL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From the spectrum and the gradient of the gated spectrum to that of the spectrum, in place of p_g."""
    b = tl.program_id(0).to(tl.int64)
    p_z += b * M * N * 2
    p_g += b * M * N * 2
    p_v += b * (4 * M + 4 * N + 2 * HR + 2 * HC)
    p_lr = p_v + M + N + HR + HC
    p_ar = p_lr + M + N
    p_er = p_ar + M + N + HR + HC
    square = spectrum_sums(p_z, p_v, M, N, ROWS, COLUMNS)
    norm, inverse = means_and_logits(
        p_v, p_r1, p_r2, p_c1, p_c2, square, M, N, HR, HC, NORMALIZE, TEMPERATURE, OUT, IN
    )
    along = tl.zeros((COLUMNS,), tl.float32)
    for j0 in range(0, N, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        columns = tl.zeros((COLUMNS,), tl.float32)
        for i0 in range(0, M, ROWS):
            i = i0 + tl.arange(0, ROWS)
            zr, zi = load_spectrum(p_z, M, N, i0, j0, ROWS, COLUMNS)
            re, im = load_spectrum(p_g, M, N, i0, j0, ROWS, COLUMNS)
            gate = tl.sigmoid(outer_sum(p_lr, p_lr + M, M, N, i0, j0, ROWS, COLUMNS))
            d, logit, re, im = gate_gradient(inverse * zr, inverse * zi, re, im, gate)
            rows = tl.load(p_ar + i, mask=(i < M) & (j0 > 0), other=0.0)  # [R]
            tl.store(p_ar + i, rows + tl.sum(logit, 1), mask=i < M)  # [R]
            columns += tl.sum(logit, 0)
            along += tl.sum(d, 0)
            store_spectrum(p_g, re, im, M, N, i0, j0, ROWS, COLUMNS)
        tl.store(p_ar + M + j, columns, mask=j < N)  # [C]
        tl.debug_barrier()
    parallel = tl.sum(along, 0)
    parallel += means_gradient(p_v, p_r1, p_r2, p_c1, p_c2, M, N, HR, HC, TEMPERATURE, OUT, IN)
    if CHANNEL:
        radial = 0.0
        least = ROUNDING * norm * inverse
        if NORMALIZE:
            radial = -parallel * inverse
            if p_gnorms is not None:
                radial += tl.load(p_gnorms + b)
        scale_vector(p_er, M, 1.0 / N, IN)
        scale_vector(p_er + M, N, 1.0 / M, IN)
        for i0 in range(0, M, ROWS):
            for j0 in range(0, N, COLUMNS):
                zr, zi = load_spectrum(p_z, M, N, i0, j0, ROWS, COLUMNS)
                pr, pi = load_spectrum(p_g, M, N, i0, j0, ROWS, COLUMNS)
                g_magnitude = outer_sum(p_er, p_er + M, M, N, i0, j0, ROWS, COLUMNS)
                zr, zi = spectrum_gradient(
                    inverse * zr, inverse * zi, pr, pi, g_magnitude, inverse, radial, least
                )
                store_spectrum(p_g, zr, zi, M, N, i0, j0, ROWS, COLUMNS)


def fits(M: int, N: int) -> bool:
    """Whether a sample is transformed on chip."""
    return max(M, N) <= LARGEST


def _tiles(M: int, N: int) -> tuple[dict[str, int], int]:
    """Tiles of the products, and the warps that hold one: 32 numbers of it a thread."""
    width_m, width_n = block(2 * M), block(2 * N)
    rows_m, rows_n = min(block(M), 8192 // width_n), min(block(N), 8192 // width_m)
    tiles = {"ROWS_M": rows_m, "ROWS_N": rows_n, "INNER": 16, "WIDTH_M": width_m, "WIDTH_N": width_n}
    return tiles, max(1, min(8, max(rows_m * width_n, rows_n * width_m) // 1024))


def factors(M: int, N: int) -> tuple[dict[str, int | float], int] | None:
    """The passes of a sample whose sides factor, and the warps that hold it: 32 numbers a thread, or 64."""
    if M not in FACTORS or N not in FACTORS:
        return None
    (m1, m2), (n1, n2) = FACTORS[M], FACTORS[N]
    constants = {"M1": m1, "M2": m2, "N1": n1, "N2": n2, "SCALE": 1 / math.sqrt(M * N)}
    return constants, max(1, min(16, M * N // 512))


# tiles of the perceptrons' weights, and of a spectrum in memory
PERCEPTRON = {"OUT": 32, "IN": 64}
SPECTRUM = {"ROWS": 16, "COLUMNS": 128}


def _pointers(weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor | int | None]:
    return dict(zip(("p_r1", "p_r2", "p_c1", "p_c2"), weights, strict=True))


def _hidden(weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, int]:
    r1, _, c1, _ = weights
    return {"HR": r1.shape[0], "HC": c1.shape[0]}


def _vectors(weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
    """Numbers a sample of means, hidden layers and logits; the backward keeps their gradients as well."""
    r1, _, c1, _ = weights
    return 2 * (r1.shape[1] + c1.shape[1]) + r1.shape[0] + c1.shape[0]


def forward_launch(
    H: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    normalize: bool,
    projection: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The gate of samples that fit; where it puts Hd, norms, and X of a projection (folded, bias, pos)."""
    B, M, N, _ = H.shape
    passes = factors(M, N)
    programs = B if passes else min(B, PROGRAMS)
    Hd, norms, X = torch.empty_like(H), H.new_empty((B if normalize else 0,)), H.new_empty((0,))
    names = ("p_w", "p_bias", "p_pos", "p_low", "p_share", "p_s", "p_x")
    project: dict[str, Tensor | int | None] = dict.fromkeys(names)
    d = 0
    if projection is not None:
        d = projection[0].shape[0]
        X = H.new_empty((B, M, d))
        scratch = H.new_empty((programs, M // 2, d))
        project = dict(zip(names, (*projection, *row_table(M, H.device), scratch, X), strict=True))
    arguments = {
        "p_h": H,
        "p_v": H.new_empty((programs, _vectors(weights))),
        "p_hd": Hd,
        "p_norms": norms if normalize else None,
        **project,
        **_pointers(weights),
    }
    blocks = projection_blocks(M, max(d, 1))
    constants = {
        "d": d,
        **_hidden(weights),
        "NORMALIZE": normalize,
        "PROJECT": projection is not None,
        "TEMPERATURE": float(temperature),
        **PERCEPTRON,
        **{f"P_{name}": value for name, value in blocks.items()},
        "PRECISION": precision(),
    }
    if passes:
        arguments |= {"p_wm": twiddle_table(M, H.device), "p_wn": twiddle_table(N, H.device)}
        kernel, (tiles, warps) = factored_gate_fwd_kernel, passes
    else:
        arguments |= {"p_tm": dft_table(M, H.device), "p_tn": dft_table(N, H.device), "B": B}
        arguments["p_z"] = H.new_empty((programs, M, N, 2))
        constants |= {"M": M, "N": N}
        kernel, (tiles, warps) = freq_gate_fwd_kernel, _tiles(M, N)
    return Launch(kernel, (programs,), arguments, constants | tiles, warps), Hd, norms, X


def backward_launch(
    gHd: Tensor,
    gnorms: Tensor | None,
    H: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    normalize: bool,
    gh: bool,
) -> tuple[Launch, Tensor, Tensor]:
    """The gate's backward of samples that fit; where it puts the gradient of H and the samples' vectors."""
    B, M, N, _ = H.shape
    passes, held = factors(M, N), M * N <= HELD
    programs = B if passes else min(B, PROGRAMS)
    gH = H.new_empty((B if gh else 0 if passes and held else programs, M, N, 2))
    vectors = H.new_empty((B, 2 * _vectors(weights)))
    arguments = {
        "p_g": gHd,
        "p_gnorms": gnorms if normalize else None,
        "p_h": H,
        "p_v": vectors,
        "p_gh": gH,
        **_pointers(weights),
    }
    constants = {
        **_hidden(weights),
        "NORMALIZE": normalize,
        "CHANNEL": gh,
        "TEMPERATURE": float(temperature),
        **PERCEPTRON,
    }
    if passes:
        arguments |= {"p_wm": twiddle_table(M, H.device), "p_wn": twiddle_table(N, H.device)}
        arguments["p_z"] = None if held else H.new_empty((B, M, N, 2))
        constants |= {"HELD": held, "ROWS": min(16, M)}
        kernel, (tiles, warps) = factored_gate_bwd_kernel, passes
    else:
        arguments |= {"p_tm": dft_table(M, H.device), "p_tn": dft_table(N, H.device), "B": B}
        arguments["p_z"] = H.new_empty((programs, 2, M, N, 2))
        constants |= {"M": M, "N": N, "PRECISION": precision()}
        kernel, (tiles, warps) = freq_gate_bwd_kernel, _tiles(M, N)
    return Launch(kernel, (programs,), arguments, constants | tiles, warps), gH, vectors


def spectral_forward_launch(
    Z: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], temperature: float, normalize: bool
) -> tuple[Launch, Tensor]:
    """The gate on a spectrum of any size, in place; where it puts the norms."""
    B, M, N, _ = Z.shape
    norms = Z.new_empty((B if normalize else 0,))
    arguments = {
        "p_z": Z,
        "p_v": Z.new_empty((B, _vectors(weights))),
        "p_norms": norms if normalize else None,
        "M": M,
        "N": N,
        **_pointers(weights),
        **_hidden(weights),
    }
    constants = {"NORMALIZE": normalize, "TEMPERATURE": float(temperature), **PERCEPTRON, **SPECTRUM}
    return Launch(spectral_gate_fwd_kernel, (B,), arguments, constants), norms


def spectral_backward_launch(
    gD: Tensor,
    gnorms: Tensor | None,
    Z: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    normalize: bool,
    gh: bool,
) -> tuple[Launch, Tensor]:
    """The gradient of a spectrum of any size, in place of gD; where it puts the samples' vectors."""
    B, M, N, _ = Z.shape
    vectors = Z.new_empty((B, 2 * _vectors(weights)))
    arguments = {
        "p_g": gD,
        "p_gnorms": gnorms if normalize else None,
        "p_z": Z,
        "p_v": vectors,
        "M": M,
        "N": N,
        **_pointers(weights),
        **_hidden(weights),
    }
    constants = {
        "NORMALIZE": normalize,
        "CHANNEL": gh,
        "TEMPERATURE": float(temperature),
        **PERCEPTRON,
        **SPECTRUM,
    }
    return Launch(spectral_gate_bwd_kernel, (B,), arguments, constants), vectors


def _transform(x: Tensor, inverse: bool) -> Tensor:
    """The library's orthonormal 2-D transform of real (B, M, N, 2), in memory of its own."""
    if x.numel() == 0:  # MKL refuses an empty batch
        return x.clone()
    transform = torch.fft.ifft2 if inverse else torch.fft.fft2
    return torch.view_as_real(transform(torch.view_as_complex(x), norm="ortho").contiguous())


def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """`Hd (B, M, N, 2)` of `H (B, M, N, 2)`; the norms `(B,)` that `normalize` divides by, else `(0,)`."""
    weights = (row_w1, row_w2, col_w1, col_w2)
    if fits(*H.shape[1:3]):
        launch, Hd, norms, _ = forward_launch(H, weights, temperature, normalize)
        launch.run()
        return Hd, norms
    Z = _transform(H, False)
    launch, norms = spectral_forward_launch(Z, weights, temperature, normalize)
    launch.run()
    return _transform(Z, True), norms


def freq_gate_backward(
    gHd: Tensor,
    gnorms: Tensor | None,
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
    gh: bool,
    gw: bool,
) -> tuple[Tensor, ...]:
    """Gradients of H (empty without `gh`) and of the four weights (empty without `gw`), by recomputation."""
    weights = (row_w1, row_w2, col_w1, col_w2)
    M, N = H.shape[1:3]
    gradients = [H.new_empty((0,)) for _ in range(5)]
    if not (gh or gw):
        return tuple(gradients)
    if fits(M, N):
        launch, gH, vectors = backward_launch(gHd, gnorms, H, weights, temperature, normalize, gh)
        launch.run()
    else:
        Z, gH = _transform(H, False), _transform(gHd, False)
        launch, vectors = spectral_backward_launch(gH, gnorms, Z, weights, temperature, normalize, gh)
        launch.run()
        if gh:
            gH = _transform(gH, True)
    if gh:
        gradients[0] = gH
    if gw:
        HR, HC = row_w1.shape[0], col_w1.shape[0]
        parts = vectors.split([M, N, HR, HC, M + N, M, N, HR, HC, M + N], 1)
        rho, kappa, hr, hc, _, ar, ac, gr, gc, _ = parts
        gradients[1:] = gr.mT @ rho, ar.mT @ hr, gc.mT @ kappa, ac.mT @ hc
    return tuple(gradients)


def gate_project(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens X `(B, M, d)` of the gated channel, Hd and the norms: one launch for samples that fit."""
    weights = (row_w1, row_w2, col_w1, col_w2)
    M, N = H.shape[1:3]
    if fits(M, N):
        projection = (fold(weight, N), bias, pos)
        launch, Hd, norms, X = forward_launch(H, weights, temperature, normalize, projection)
        launch.run()
        return X, Hd, norms
    Hd, norms = freq_gate(H, *weights, temperature, normalize)
    return dual_view_project(Hd, weight, bias, pos), Hd, norms
