// The AE+ loss of one sample with its gradients, as phases between barriers. The same source is the body of
// `aeplus_fwd_kernel` and runs on the host, where a phase is called for one thread after the other.
//
// E = H - U S V^H is formed once, element by element, and kept in global memory (the L2 cache holds what the
// resident blocks have there). With X = E where |E| < 1.5 |H| and X = H otherwise, W = X V, Gu = U^H U, Gv = V^H V:
//   M = U^H H V = U^H W + Gu S Gv of E, and U^H W of H;  K = dL/dM less the residual's part (see `coefficients`)
//   gU = W (K^H - alpha S) + U B,      B = S Gv Y + 2 lam (Gu - I) / |Gu - I|,  Y = K^H of E, alpha S of H
//   gV = X^H U (K - alpha S) + V D,    D = S Gu Y + 2 lam (Gv - I) / |Gv - I|,  Y = K of E, alpha S of H
//   gS = -alpha Re diag(U^H E V) + spectral part
//   gH = alpha E + b H + U K V^H
// The other way round the parts that cancel in E, or in H = E + U S V^H, would do so after their products had been
// rounded. Z = X^H U is never formed; B, U K and U (K - alpha S) take the place of W in turn.
//
// Shared memory in bytes, with c = sizeof(complex), e = c / 2, P(x) = x rounded up to 8 rows, q = r rounded
// up to 4, l = q + 2 (an odd number of 16-byte groups keeps four-row reads free of bank conflicts),
// t = 4 x 4 tiles of a panel, rounded up to 32, at least 128, at most 512 (256 for float64 and at level 0):
//   panels    c l (P(M) [U, level >= 1] + P(N) [V, level >= 2] + P(M) [W, level 3])
//   Gram      c (q l + max(q l, 16 P(N), 20 P(M) - q l))
//   the rest  c q + 1024 + 32 e + e q + 8 e t
// float32: 64x64 r=32 takes 75,264 bytes at level 3; 128x128 r=64 takes 221,056 at level 2 (sm_90, sm_100),
// 153,472 at level 1 (sm_80) and 77,696 at level 0 (sm_120).
// The launch takes the highest level that fits the device; E and panels that do not fit live in a workspace in
// global memory, one for each resident block. H streams once for the residual, and once for gH; X for W and for gV.
#pragma once

#include <cmath>
#include <cstdint>
#ifndef __CUDACC__
#include <cstring>
#endif

#include "phases.cuh"

namespace lomacs::aeplus {

constexpr int kStage = 8;      // columns or rows of H in one stage
constexpr int kStageLd = 10;   // kStage + 2: again an odd number of 16-byte groups
constexpr int kSums = 8;
constexpr int kLanes = 16;     // partial sums of one quantity
constexpr int kMaxLevel = 3;

template <class T>
struct alignas(16) Pair {
  Cx<T> x[2];
};

// 4 x 4 complex outputs of one thread
template <class T>
struct Acc {
  T re[4][4], im[4][4];
};

// padded sizes and the order of the regions, in complex elements and then in reals from the start
struct Plan {
  int Mp, Np, q, ld, threads;
  int U, V, W, M, G, d;
  int E, far;                // of the workspace: where E begins, elements of one block
  int part, scalars, sums, S, red;
  int bytes;
};

template <class T>
struct Args {
  const Cx<T>*U, *V, *H;
  const T* S;
  const double* weights;     // lam, w_energy, w_diag, w_match
  Cx<T>*gU, *gV, *gH;        // null where not wanted
  T* gS;
  T* terms;                  // (batch, 5)
  Cx<T>* work;               // plan.far elements for each resident block
  int64_t batch;
  Plan plan;                 // from the host: kernel arguments cost no registers
  int M, N, r;
  bool mean;
  bool wide_panel, wide_H;   // even rows that start on 16 bytes
};

// level 0 addresses everything in 64 bits and float64 doubles every sum: both need more than 128 registers
constexpr int thread_limit(int element, int level) { return element == 4 && level > 0 ? 512 : 256; }

inline int thread_count(int64_t M, int64_t N, int64_t r, int limit) {
  const int64_t rows = ((M > N ? M : N) + 7) / 8 * 2, tiles = (rows * ((r + 3) / 4) + 31) / 32 * 32;
  return int(tiles < 128 ? 128 : tiles > limit ? limit : tiles);
}

inline Plan make_plan(int64_t M, int64_t N, int64_t r, int element, int threads, int level) {
  Plan p{};
  p.Mp = int((M + 7) / 8 * 8);
  p.Np = int((N + 7) / 8 * 8);
  p.q = int((r + 3) / 4 * 4);
  p.ld = p.q + 2;
  p.threads = threads;
  int near = 0, far = 0;
  const auto panel = [&](int rows, int least) {
    int& next = level >= least ? near : far;
    next += rows * p.ld;
    return next - rows * p.ld;
  };
  p.U = panel(p.Mp, 1);
  p.V = panel(p.Np, 2);
  p.W = panel(p.Mp, 3);
  p.E = far;
  p.far = far + int(M * N + 1) / 2 * 2;
  const int gram = p.q * p.ld, rows = 2 * kStage * p.Np, columns = 2 * kStageLd * p.Mp - gram;
  p.M = near;
  p.G = p.M + gram;
  p.d = p.G + (gram > rows ? gram > columns ? gram : columns : rows > columns ? rows : columns);
  p.part = 2 * (p.d + p.q);
  p.scalars = p.part + kSums * kLanes * 8 / element;
  p.sums = p.scalars + 16;
  p.S = p.sums + 16;
  p.red = p.S + p.q;
  p.bytes = element * (p.red + kSums * threads);
  return p;
}

template <class T>
LOMACS_FN void copy_async(Cx<T>* to, const Cx<T>* from, bool valid) {
#ifdef __CUDA_ARCH__
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (sizeof(T) == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(from), "r"(valid ? 8 : 0) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid ? 16 : 0) : "memory");
  }
#elif !defined(__CUDACC__)
  *to = valid ? *from : Cx<T>{0, 0};
#endif
}

template <class T>
LOMACS_FN void copy_pair_async(Cx<T>* to, const Cx<T>* from, bool valid) {
  if constexpr (sizeof(T) == 4) {
#ifdef __CUDA_ARCH__
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(valid ? 16 : 0) : "memory");
#elif !defined(__CUDACC__)
    copy_async(to, from, valid);
    copy_async(to + 1, from + 1, valid);
#endif
  } else {
    copy_async(to, from, valid);
    copy_async(to + 1, from + 1, valid);
  }
}

LOMACS_FN void copies_landed() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <class T>
LOMACS_FN Pair<T> load_pair(const Cx<T>* p) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {{{v.x, v.y}, {v.z, v.w}}};
  } else {
    const double2 a = reinterpret_cast<const double2*>(p)[0], b = reinterpret_cast<const double2*>(p)[1];
    return {{{a.x, a.y}, {b.x, b.y}}};
  }
#else
  Pair<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
#endif
}

template <class T>
LOMACS_FN void store_pair(Cx<T>* p, const Pair<T>& v) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(v.x[0].re, v.x[0].im, v.x[1].re, v.x[1].im);
  } else {
    reinterpret_cast<double2*>(p)[0] = make_double2(v.x[0].re, v.x[0].im);
    reinterpret_cast<double2*>(p)[1] = make_double2(v.x[1].re, v.x[1].im);
  }
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

// columns c and c + 1 of a row of `columns` elements in global memory, zero outside
template <class T>
LOMACS_FN Pair<T> read_row(const Cx<T>* row, int c, int columns, bool wide) {
  if (wide) return c < columns ? load_pair(row + c) : Pair<T>{};
  Pair<T> v{};
  if (c < columns) v.x[0] = row[c];
  if (c + 1 < columns) v.x[1] = row[c + 1];
  return v;
}

template <class T>
LOMACS_FN void write_row(Cx<T>* row, int c, int columns, bool wide, const Pair<T>& v) {
  if (wide) {
    if (c < columns) store_pair(row + c, v);
    return;
  }
  if (c < columns) row[c] = v.x[0];
  if (c + 1 < columns) row[c + 1] = v.x[1];
}

// Which four rows or columns of `total` a tile holds. Rows are taken apart (neighbouring threads have
// neighbouring rows), pairs are two and two, so that 16-byte accesses of neighbouring threads join.
struct Apart {
  LOMACS_FN static int index(int tile, int tiles, int p) { return tile + p * tiles; }
};
struct Paired {
  LOMACS_FN static int index(int tile, int tiles, int p) { return 2 * (tile + (p >> 1) * tiles) + (p & 1); }
};

// four rows of a row-major panel; the summed index runs along the row
template <class T, class Pick>
struct Rows {
  const Cx<T>* row[4];
  LOMACS_FN Rows(const Cx<T>* panel, int ld, int tile, int tiles) {
    LOMACS_UNROLL for (int p = 0; p < 4; ++p) row[p] = panel + Pick::index(tile, tiles, p) * ld;
  }
  LOMACS_FN void get(int k, Cx<T> (&out)[2][4]) const {
    LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
      const Pair<T> v = load_pair(row[p] + k);
      out[0][p] = v.x[0];
      out[1][p] = v.x[1];
    }
  }
};

// four columns of a row-major panel; the summed index runs down the rows
template <class T>
struct Columns {
  const Cx<T>* column[2];
  int ld;
  LOMACS_FN Columns(const Cx<T>* panel, int ld_, int tile, int tiles)
      : column{panel + 2 * tile, panel + 2 * (tile + tiles)}, ld(ld_) {}
  LOMACS_FN void get(int k, Cx<T> (&out)[2][4]) const {
    LOMACS_UNROLL for (int j = 0; j < 2; ++j) {
      LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
        const Pair<T> v = load_pair(column[h] + (k + j) * ld);
        out[j][2 * h] = v.x[0];
        out[j][2 * h + 1] = v.x[1];
      }
    }
  }
};

template <class T>
LOMACS_FN void clear(Acc<T>& acc) {
  LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
    LOMACS_UNROLL for (int q = 0; q < 4; ++q) acc.re[p][q] = acc.im[p][q] = 0;
  }
}

// acc += sum_k a_k b_k over an even number of k, either factor conjugated; `scale`, if any, weights k.
// Grouped adds two k at a time: a quarter more instructions, half the rounding noise.
template <bool ConjA, bool ConjB, bool Grouped = false, class T, class A, class B>
LOMACS_FN void multiply(Acc<T>& acc, const A& a, const B& b, int count, const T* scale = nullptr) {
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int k = 0; k < count; k += 2) {
    Cx<T> x[2][4], y[2][4];
    a.get(k, x);
    b.get(k, y);
    if (scale != nullptr) {
      LOMACS_UNROLL for (int j = 0; j < 2; ++j) {
        const T s = scale[k + j];
        LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
          x[j][p].re *= s;
          x[j][p].im *= s;
        }
      }
    }
    if constexpr (Grouped) {
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        LOMACS_UNROLL for (int q = 0; q < 4; ++q) {
          T re = 0, im = 0;
          LOMACS_UNROLL for (int j = 0; j < 2; ++j) {
            const T ar = x[j][p].re, ai = ConjA ? -x[j][p].im : x[j][p].im;
            const T br = y[j][q].re, bi = ConjB ? -y[j][q].im : y[j][q].im;
            re += ar * br;
            re -= ai * bi;
            im += ar * bi;
            im += ai * br;
          }
          acc.re[p][q] += re;
          acc.im[p][q] += im;
        }
      }
    } else {
      LOMACS_UNROLL for (int j = 0; j < 2; ++j) {
        LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
          LOMACS_UNROLL for (int q = 0; q < 4; ++q) {
            const T ar = x[j][p].re, ai = ConjA ? -x[j][p].im : x[j][p].im;
            const T br = y[j][q].re, bi = ConjB ? -y[j][q].im : y[j][q].im;
            acc.re[p][q] += ar * br;
            acc.re[p][q] -= ai * bi;
            acc.im[p][q] += ar * bi;
            acc.im[p][q] += ai * br;
          }
        }
      }
    }
  }
}

template <class T>
LOMACS_FN Pair<T> pair_of(const Acc<T>& acc, int p, int h) {
  return {{{acc.re[p][2 * h], acc.im[p][2 * h]}, {acc.re[p][2 * h + 1], acc.im[p][2 * h + 1]}}};
}

template <class T>
LOMACS_FN T root(T x) {
  return sqrt(x);
}

// 1 / x, and 0 at 0: the subgradient of a norm
template <class T>
LOMACS_FN T inverse(T x) {
  return x > 0 ? T(1) / x : T(0);
}

template <class T>
LOMACS_FN T sign(T x) {
  return T(x > 0) - T(x < 0);
}

template <class T>
struct Scalars {
  T alpha, off, diagonal, spectral, slope, gu, gv, h;
};

// of each quantity a thread's part; after the reduction the roots, and |M| behind them; kGap is the sum of
// |S_k - |M_kk||, or after the reduction |S| - |diag M| of the "norm" form
enum Sum { kE2, kH2, kOff2, kDiag2, kGu2, kGv2, kS2, kGap };
constexpr int kTies = kSums + 1;  // whether there are ties

template <class T, int Level>
struct Block {
  const Args<T>& a;
  const Plan& s;
  const int threads;
  const Cx<T>* H;
  Cx<T>* E;
  Cx<T>*U, *V, *W;       // padded panels, in shared memory or in the workspace
  Cx<T>*M, *G;           // Gram regions; both together, or G alone, also stage H
  Cx<T>* d;              // diag(M), later see `gaps`
  double* part;
  Scalars<T>* c;
  T *S, *sums, *red;
  int64_t sample;

  LOMACS_FN Block(const Args<T>& args, int64_t sample_, int64_t slot, char* shared)
      : a(args), s(args.plan), threads(args.plan.threads), sample(sample_) {
    Cx<T>* const near = reinterpret_cast<Cx<T>*>(shared);
    T* const reals = reinterpret_cast<T*>(shared);
    Cx<T>* far = args.work + slot * s.far;
    U = (Level >= 1 ? near : far) + s.U;
    V = (Level >= 2 ? near : far) + s.V;
    W = (Level >= 3 ? near : far) + s.W;
    M = near + s.M;
    G = near + s.G;
    d = near + s.d;
    part = reinterpret_cast<double*>(reals + s.part);
    c = reinterpret_cast<Scalars<T>*>(reals + s.scalars);
    sums = reals + s.sums;
    S = reals + s.S;
    red = reals + s.red;
    H = args.H + sample * args.M * args.N;
    E = far + s.E;
  }

  LOMACS_FN void load_panel(Cx<T>* panel, const Cx<T>* from, int rows, int padded, int t) const {
    const int pairs = s.q / 2;
    for (int x = t; x < padded * pairs; x += threads) {
      const int i = x / pairs, k = 2 * (x % pairs);
      store_pair(panel + i * s.ld + k,
                 i < rows ? read_row(from + int64_t(i) * a.r, k, a.r, a.wide_panel) : Pair<T>{});
    }
  }

  LOMACS_FN void load(int t) const {
    load_panel(U, a.U + sample * a.M * a.r, a.M, s.Mp, t);
    load_panel(V, a.V + sample * a.N * a.r, a.N, s.Np, t);
    if (t == 0) sums[kTies] = 0;
    T s2 = 0;
    for (int k = t; k < s.q; k += threads) {
      const T x = k < a.r ? a.S[sample * a.r + k] : T(0);
      S[k] = x;
      s2 += x * x;
    }
    red[kS2 * threads + t] = s2;
  }

  // E = H - U S V^H, |E|^2 and |H|^2
  LOMACS_FN void residual(int t) const {
    const int rows = s.Mp / 4, columns = s.Np / 4;
    T e2 = 0, h2 = 0;
    for (int x = t; x < rows * columns; x += threads) {
      const int y = x / columns, z = x % columns;
      Acc<T> acc;
      clear(acc);
      multiply<false, true, true>(acc, Rows<T, Apart>(U, s.ld, y, rows), Rows<T, Paired>(V, s.ld, z, columns), s.q,
                                  S);
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Apart::index(y, rows, p);
        LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
          // panels are zero outside, so nothing is added there
          const int j = Paired::index(z, columns, 2 * h);
          Pair<T> v = i < a.M ? read_row(H + int64_t(i) * a.N, j, a.N, a.wide_H) : Pair<T>{};
          LOMACS_UNROLL for (int w = 0; w < 2; ++w) {
            h2 += v.x[w].re * v.x[w].re + v.x[w].im * v.x[w].im;
            const T re = v.x[w].re - acc.re[p][2 * h + w], im = v.x[w].im - acc.im[p][2 * h + w];
            e2 += re * re + im * im;
            v.x[w] = {re, im};
          }
          if (i < a.M) write_row(E + int64_t(i) * a.N, j, a.N, a.wide_H, v);
        }
      }
    }
    red[kE2 * threads + t] = e2;
    red[kH2 * threads + t] = h2;
  }

  // whether X is E; from the first reduction on
  LOMACS_FN bool direct() const { return sums[kE2] < T(1.5) * sums[kH2]; }
  LOMACS_FN const Cx<T>* factor() const { return direct() ? E : H; }

  // kStage columns of X, rows apart
  LOMACS_FN void stage_columns(int step, int t) const {
    Cx<T>* to = M + (step & 1) * s.Mp * kStageLd;
    const Cx<T>* X = factor();
    for (int x = t; x < s.Mp * (kStage / 2); x += threads) {
      const int i = x / (kStage / 2), k = 2 * (x % (kStage / 2)), j = step * kStage + k;
      const bool row = i < a.M;
      const Cx<T>* from = X + (row ? int64_t(i) * a.N : 0);
      Cx<T>* at = to + i * kStageLd + k;
      if (a.wide_H) {
        copy_pair_async(at, j < a.N ? from + j : from, row && j < a.N);
      } else {
        copy_async(at, j < a.N ? from + j : from, row && j < a.N);
        copy_async(at + 1, j + 1 < a.N ? from + j + 1 : from, row && j + 1 < a.N);
      }
    }
  }

  // kStage rows of X
  LOMACS_FN void stage_rows(int step, int t) const {
    Cx<T>* to = G + (step & 1) * s.Np * kStage;
    const Cx<T>* X = factor();
    const int pairs = s.Np / 2;
    for (int x = t; x < kStage * pairs; x += threads) {
      const int k = x / pairs, j = 2 * (x % pairs), i = step * kStage + k;
      const bool row = i < a.M;
      const Cx<T>* from = X + (row ? int64_t(i) * a.N : 0);
      Cx<T>* at = to + k * s.Np + j;
      if (a.wide_H) {
        copy_pair_async(at, j < a.N ? from + j : from, row && j < a.N);
      } else {
        copy_async(at, j < a.N ? from + j : from, row && j < a.N);
        copy_async(at + 1, j + 1 < a.N ? from + j + 1 : from, row && j + 1 < a.N);
      }
    }
  }

  // W += X[:, stage] V[stage, :]; the next stage travels meanwhile
  LOMACS_FN void project(int step, int steps, int tile, int t, Acc<T>& acc) const {
    if (step + 1 < steps) stage_columns(step + 1, t);
    const int rows = s.Mp / 4, columns = s.q / 4;
    if (tile < rows * columns) {
      const int y = tile / columns, z = tile % columns;
      multiply<false, false, true>(acc, Rows<T, Apart>(M + (step & 1) * s.Mp * kStageLd, kStageLd, y, rows),
                                   Columns<T>(V + step * kStage * s.ld, s.ld, z, columns), kStage);
      if (step + 1 == steps) store_panel(W, acc, y, z);
    }
    copies_landed();
  }

  LOMACS_FN void store_panel(Cx<T>* panel, const Acc<T>& acc, int y, int z) const {
    const int rows = s.Mp / 4, columns = s.q / 4;
    LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
      LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
        store_pair(panel + Apart::index(y, rows, p) * s.ld + Paired::index(z, columns, 2 * h), pair_of(acc, p, h));
      }
    }
  }

  // U^H W in full, in the place of M. Gu above the diagonal of G, Gv below it, their real diagonals in one complex number.
  LOMACS_FN void gram(int t) const {
    const int tiles = s.q / 4, half = tiles * (tiles + 1) / 2, full = tiles * tiles;
    T gu2 = 0, gv2 = 0;
    for (int x = t; x < full + 2 * half; x += threads) {
      const bool square = x < full, left = x < full + half;
      int y, z;
      if (square) {
        y = x / tiles, z = x % tiles;
      } else {
        int w = x - full - (left ? 0 : half);
        for (y = 0; w >= tiles - y; ++y) w -= tiles - y;
        z = y + w;
      }
      Acc<T> acc;
      clear(acc);
      if (square) {
        multiply<true, false, true>(acc, Columns<T>(U, s.ld, y, tiles), Columns<T>(W, s.ld, z, tiles), s.Mp);
      } else {
        const Cx<T>* panel = left ? U : V;
        multiply<true, false, true>(acc, Columns<T>(panel, s.ld, y, tiles), Columns<T>(panel, s.ld, z, tiles),
                                    left ? s.Mp : s.Np);
      }
      T own = 0;
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Paired::index(y, tiles, p);
        LOMACS_UNROLL for (int q = 0; q < 4; ++q) {
          const int j = Paired::index(z, tiles, q);
          const T re = acc.re[p][q], im = acc.im[p][q];
          if (square) {
            M[i * s.ld + j] = {re, im};
          } else if (i == j) {
            if (left) {
              G[i * s.ld + i].re = re;
            } else {
              G[i * s.ld + i].im = re;
            }
            const T x1 = i < a.r ? re - 1 : T(0);
            own += x1 * x1;
          } else if (y != z || i < j) {
            // a tile on the diagonal holds both triangles, any other stands for two
            own += 2 * (re * re + im * im);
            const int low = i < j ? i : j, high = i < j ? j : i;
            if (left) {
              G[low * s.ld + high] = {re, i < j ? im : -im};
            } else {
              G[high * s.ld + low] = {re, i < j ? -im : im};
            }
          }
        }
      }
      gu2 += left ? own : T(0);
      gv2 += left ? T(0) : own;
    }
    red[kGu2 * threads + t] = gu2;
    red[kGv2 * threads + t] = gv2;
  }

  // (i, j) of Gu, or of Gv where Lower, whichever triangle holds it
  template <bool Lower>
  LOMACS_FN Cx<T> of_gram(int i, int j) const {
    if (i == j) return {Lower ? G[i * s.ld + i].im : G[i * s.ld + i].re, T(0)};
    const bool there = (i > j) == Lower;
    const Cx<T> v = G[there ? i * s.ld + j : j * s.ld + i];
    return {v.re, there ? v.im : -v.im};
  }

  // four rows of Gu, or of Gv where Lower
  template <bool Lower, class Pick>
  struct GramRows {
    const Block& b;
    int tile, tiles;
    LOMACS_FN void get(int k, Cx<T> (&out)[2][4]) const {
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        LOMACS_UNROLL for (int j = 0; j < 2; ++j) {
          out[j][p] = b.template of_gram<Lower>(Pick::index(tile, tiles, p), k + j);
        }
      }
    }
  };

  // M = U^H H V out of U^H W; its diagonal and Re diag(U^H E V)
  LOMACS_FN void complete(int t) const {
    const int tiles = s.q / 4;
    const bool of_E = direct();
    T off2 = 0, diag2 = 0;
    for (int x = t; x < tiles * tiles; x += threads) {
      const int y = x / tiles, z = x % tiles;
      Acc<T> acc;
      clear(acc);
      multiply<false, true, true>(acc, GramRows<false, Apart>{*this, y, tiles}, GramRows<true, Paired>{*this, z, tiles},
                                  s.q, S);
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Apart::index(y, tiles, p);
        LOMACS_UNROLL for (int q = 0; q < 4; ++q) {
          const int j = Paired::index(z, tiles, q);
          Cx<T>& m = M[i * s.ld + j];
          const Cx<T> v = m;
          if (of_E) m = {v.re + acc.re[p][q], v.im + acc.im[p][q]};
          const T square = m.re * m.re + m.im * m.im;
          if (i == j) {
            d[i] = {of_E ? v.re : v.re - acc.re[p][q], T(0)};
            diag2 += square;
          } else {
            off2 += square;
          }
        }
      }
    }
    red[kOff2 * threads + t] = off2;
    red[kDiag2 * threads + t] = diag2;
  }

  LOMACS_FN static T magnitude(T x) { return x < 0 ? -x : x; }
  LOMACS_FN static T modulus(const Cx<T>& x) { return root(x.re * x.re + x.im * x.im); }

  // beside Re diag(U^H E V), S - |diag(M)|
  LOMACS_FN void gaps(int t) const {
    T gap = 0;
    for (int k = t; k < a.r; k += threads) {
      const T x = S[k] - modulus(M[k * s.ld + k]);
      d[k].im = x;
      gap += magnitude(x);
      // of whoever writes it, the same
      if (tied(k)) sums[kTies] = 1;
    }
    red[kGap * threads + t] = gap;
  }

  // closer than float32 sums can tell which of the two is larger
  LOMACS_FN bool tied(int k) const { return magnitude(d[k].im) < T(1) / 32768 * S[k]; }
  LOMACS_FN bool tied() const { return magnitude(sums[kGap]) < T(1) / 32768 * sums[kS2]; }

  LOMACS_FN double* wide_sums() const { return reinterpret_cast<double*>(red); }

  // M_kk of a tie once more in float64, eight threads a row
  LOMACS_FN void tie_parts(int k, int t) const {
    double re = 0, im = 0;
    for (int x = t; x < 8 * a.M; x += threads) {
      const int i = x / 8;
      const Cx<T>* row = H + int64_t(i) * a.N;
      double wr = 0, wi = 0;
      for (int j = x % 8; j < a.N; j += 8) {
        const Cx<T> h = row[j], v = V[j * s.ld + k];
        wr += double(h.re) * v.re - double(h.im) * v.im;
        wi += double(h.re) * v.im + double(h.im) * v.re;
      }
      const Cx<T> u = U[i * s.ld + k];
      re += u.re * wr + u.im * wi;
      im += u.re * wi - u.im * wr;
    }
    wide_sums()[2 * t] = re;
    wide_sums()[2 * t + 1] = im;
  }

  LOMACS_FN void tie_lanes(int t) const {
    if (t >= 2 * kLanes) return;
    double sum = 0;
    for (int u = t; u < 2 * threads; u += 2 * kLanes) sum += wide_sums()[u];
    part[t] = sum;
  }

  LOMACS_FN void tie_gap(int k, int t) const {
    if (t != 0) return;
    double re = 0, im = 0;
    for (int l = 0; l < kLanes; ++l) {
      re += part[2 * l];
      im += part[2 * l + 1];
    }
    if (a.mean) {
      const T gap = T(S[k] - root(re * re + im * im));
      sums[kGap] += magnitude(gap) - magnitude(d[k].im);
      d[k].im = gap;
    } else {
      double& diag2 = part[2 * kLanes];
      diag2 = (k > 0 ? diag2 : 0) + re * re + im * im;
    }
  }

  LOMACS_FN void tie_norms(int t) const {
    if (t != 0) return;
    double s2 = 0;
    for (int k = 0; k < a.r; ++k) s2 += double(S[k]) * double(S[k]);
    sums[kGap] = T(root(s2) - root(part[2 * kLanes]));
  }

  // of the first `count` quantities, in fixed order: each lane its own threads, then the lanes
  LOMACS_FN void reduce_lanes(int count, int t) const {
    for (int x = t; x < count * kLanes; x += threads) {
      double sum = 0;
      for (int u = x % kLanes; u < threads; u += kLanes) sum += double(red[x / kLanes * threads + u]);
      part[x] = sum;
    }
  }

  LOMACS_FN void reduce_sums(int count, int t) const {
    if (t >= count) return;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += part[t * kLanes + l];
    if (t == kDiag2) {
      double off2 = 0;
      for (int l = 0; l < kLanes; ++l) off2 += part[kOff2 * kLanes + l];
      sums[kSums] = root(T(sum + off2));
    }
    if (t == kGap && !a.mean) {
      double s2 = 0, diag2 = 0;
      for (int l = 0; l < kLanes; ++l) {
        s2 += part[kS2 * kLanes + l];
        diag2 += part[kDiag2 * kLanes + l];
      }
      sum = root(s2) - root(diag2);
    }
    sums[t] = t == kGap ? T(sum) : root(T(sum));
  }

  LOMACS_FN void coefficients(int t) const {
    if (t != 0) return;
    const T lam = T(a.weights[0]), w_energy = T(a.weights[1]), w_diag = T(a.weights[2]), w_match = T(a.weights[3]);
    const T e = sums[kE2], h = sums[kH2], m = sums[kSums], off = sums[kOff2], diagonal = sums[kDiag2];
    const T gu = sums[kGu2], gv = sums[kGv2], size = sums[kS2];
    const T inv = T(1) / (h + T(1e-8)), share = T(1) / T(a.batch);
    T gap, towards;
    if (a.mean) {
      gap = sums[kGap] / T(a.r);
      towards = 1 / T(a.r);
    } else {
      gap = sums[kGap];
      towards = sign(gap);
      gap = gap < 0 ? -gap : gap;
    }
    T* terms = a.terms + sample * 5;
    terms[0] = e * inv;
    terms[1] = gu + gv;
    terms[2] = 1 - m * inv;
    terms[3] = off * inv;
    terms[4] = gap * inv;
    Scalars<T> out;
    out.alpha = share * inv * inverse(e);
    out.diagonal = -share * w_energy * inv * inverse(m);
    out.off = out.diagonal + share * w_diag * inv * inverse(off);
    // "mean": of one k, before sign and modulus
    out.spectral = -share * w_match * inv * towards * (a.mean ? T(1) : inverse(diagonal));
    out.slope = share * w_match * inv * towards * (a.mean ? T(1) : inverse(size));
    out.gu = 2 * share * lam * inverse(gu);
    out.gv = 2 * share * lam * inverse(gv);
    out.h = -share * inv * inv * inverse(h) * (e - w_energy * m + w_diag * off + w_match * gap);
    *c = out;
  }

  LOMACS_FN T spectral(int k, const Cx<T>& m) const {
    return a.mean ? c->spectral * sign(d[k].im) * inverse(modulus(m)) : c->spectral;
  }

  LOMACS_FN void spectrum(int t) const {
    for (int k = t; k < a.r; k += threads) {
      const T own = a.mean ? c->slope * sign(d[k].im) : c->slope * S[k];
      a.gS[sample * a.r + k] = own - c->alpha * d[k].re;
    }
  }

  // M becomes K
  LOMACS_FN void core(int t) const {
    for (int x = t; x < s.q * s.q; x += threads) {
      const int i = x / s.q, j = x % s.q;
      Cx<T>& m = M[i * s.ld + j];
      const T scale = i == j ? c->diagonal + spectral(i, m) : c->off;
      m = {scale * m.re, scale * m.im};
    }
  }

  // B, or D where Right, in the place of W
  template <bool Right>
  LOMACS_FN void couple(int t) const {
    const int tiles = s.q / 4;
    const bool of_E = direct();
    const T factor = Right ? c->gv : c->gu;
    for (int x = t; x < tiles * tiles; x += threads) {
      const int y = x / tiles, z = x % tiles;
      Acc<T> acc;
      clear(acc);
      if (of_E) {
        const GramRows<!Right, Apart> rows{*this, y, tiles};
        if constexpr (Right) {
          multiply<false, false>(acc, rows, Columns<T>(M, s.ld, z, tiles), s.q);
        } else {
          multiply<false, true>(acc, rows, Rows<T, Paired>(M, s.ld, z, tiles), s.q);
        }
      }
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Apart::index(y, tiles, p);
        LOMACS_UNROLL for (int q = 0; q < 4; ++q) {
          const int j = Paired::index(z, tiles, q);
          Cx<T> other{acc.re[p][q], acc.im[p][q]};
          if (!of_E) {
            const T weight = c->alpha * S[j];
            other = of_gram<!Right>(i, j);
            other = {weight * other.re, weight * other.im};
          }
          const Cx<T> own = of_gram<Right>(i, j);
          const T one = i == j && i < a.r ? T(1) : T(0);
          W[i * s.ld + j] = {S[i] * other.re + factor * (own.re - one), S[i] * other.im + factor * own.im};
        }
      }
    }
  }

  LOMACS_FN void copy_square(Cx<T>* to, const Cx<T>* from, int t) const {
    const int pairs = s.q / 2;
    for (int x = t; x < s.q * pairs; x += threads) {
      const int at = x / pairs * s.ld + 2 * (x % pairs);
      store_pair(to + at, load_pair(from + at));
    }
  }

  // gU = W (K^H - alpha S) first, U B later: W and B share a place
  template <bool Second>
  LOMACS_FN void left_gradient(int t) const {
    const int rows = s.Mp / 4, columns = s.q / 4;
    Cx<T>* out = a.gU + sample * a.M * a.r;
    for (int x = t; x < rows * columns; x += threads) {
      const int y = x / columns, z = x % columns;
      Acc<T> acc;
      clear(acc);
      if constexpr (Second) {
        multiply<false, false>(acc, Rows<T, Apart>(U, s.ld, y, rows), Columns<T>(W, s.ld, z, columns), s.q);
      } else {
        multiply<false, true>(acc, Rows<T, Apart>(W, s.ld, y, rows), Rows<T, Paired>(M, s.ld, z, columns), s.q);
      }
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Apart::index(y, rows, p);
        if (i >= a.M) continue;
        LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
          const int j = Paired::index(z, columns, 2 * h);
          Cx<T>* row = out + int64_t(i) * a.r;
          Pair<T> v = pair_of(acc, p, h);
          if constexpr (Second) {
            const Pair<T> w = read_row(row, j, a.r, a.wide_panel);
            LOMACS_UNROLL for (int u = 0; u < 2; ++u) v.x[u] = {v.x[u].re + w.x[u].re, v.x[u].im + w.x[u].im};
          } else {
            const Pair<T> w = load_pair(W + i * s.ld + j);
            LOMACS_UNROLL for (int u = 0; u < 2; ++u) {
              const T weight = c->alpha * S[j + u];
              v.x[u] = {v.x[u].re - weight * w.x[u].re, v.x[u].im - weight * w.x[u].im};
            }
          }
          write_row(row, j, a.r, a.wide_panel, v);
        }
      }
    }
  }

  // U K in the place of W
  LOMACS_FN void turn(int t) const {
    const int rows = s.Mp / 4, columns = s.q / 4;
    for (int x = t; x < rows * columns; x += threads) {
      const int y = x / columns, z = x % columns;
      Acc<T> acc;
      clear(acc);
      multiply<false, false>(acc, Rows<T, Apart>(U, s.ld, y, rows), Columns<T>(M, s.ld, z, columns), s.q);
      store_panel(W, acc, y, z);
    }
  }

  // W = U K becomes U (K - alpha S)
  LOMACS_FN void shift(int t) const {
    const int pairs = s.q / 2;
    for (int x = t; x < s.Mp * pairs; x += threads) {
      const int k = 2 * (x % pairs), at = x / pairs * s.ld + k;
      const Pair<T> u = load_pair(U + at);
      Pair<T> v = load_pair(W + at);
      LOMACS_UNROLL for (int p = 0; p < 2; ++p) {
        const T weight = c->alpha * S[k + p];
        v.x[p] = {v.x[p].re - weight * u.x[p].re, v.x[p].im - weight * u.x[p].im};
      }
      store_pair(W + at, v);
    }
  }

  // gV = V D + X^H W, X by stages of rows
  LOMACS_FN void right_gradient(int step, int steps, int tile, int t, Acc<T>& acc) const {
    if (step + 1 < steps) stage_rows(step + 1, t);
    const int rows = s.Np / 4, columns = s.q / 4;
    if (tile < rows * columns) {
      const int y = tile / columns, z = tile % columns;
      if (step == 0) {
        multiply<false, false>(acc, Rows<T, Paired>(V, s.ld, y, rows), Columns<T>(M, s.ld, z, columns), s.q);
      }
      multiply<true, false>(acc, Columns<T>(G + (step & 1) * s.Np * kStage, s.Np, y, rows),
                            Columns<T>(W + step * kStage * s.ld, s.ld, z, columns), kStage);
      if (step + 1 == steps) {
        LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
          const int i = Paired::index(y, rows, p);
          if (i >= a.N) continue;
          LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
            write_row(a.gV + (sample * a.N + i) * a.r, Paired::index(z, columns, 2 * h), a.r, a.wide_panel,
                      pair_of(acc, p, h));
          }
        }
      }
    }
    copies_landed();
  }

  LOMACS_FN void channel_gradient(int t) const {
    const int rows = s.Mp / 4, columns = s.Np / 4;
    const T of_E = c->alpha, of_H = c->h;
    for (int x = t; x < rows * columns; x += threads) {
      const int y = x / columns, z = x % columns;
      Acc<T> acc;
      clear(acc);
      multiply<false, true>(acc, Rows<T, Apart>(W, s.ld, y, rows), Rows<T, Paired>(V, s.ld, z, columns), s.q);
      LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
        const int i = Apart::index(y, rows, p);
        if (i >= a.M) continue;
        LOMACS_UNROLL for (int h = 0; h < 2; ++h) {
          const int j = Paired::index(z, columns, 2 * h);
          const Pair<T> e = read_row(E + int64_t(i) * a.N, j, a.N, a.wide_H);
          const Pair<T> w = read_row(H + int64_t(i) * a.N, j, a.N, a.wide_H);
          Pair<T> v = pair_of(acc, p, h);
          LOMACS_UNROLL for (int u = 0; u < 2; ++u) {
            v.x[u] = {v.x[u].re + of_E * e.x[u].re + of_H * w.x[u].re,
                      v.x[u].im + of_E * e.x[u].im + of_H * w.x[u].im};
          }
          write_row(a.gH + (sample * a.M + i) * a.N, j, a.N, a.wide_H, v);
        }
      }
    }
  }
};

// `threads.run(phase)` calls the phase for every thread of the block and ends in a barrier.
template <class T, int Level, class Threads>
LOMACS_FN void aeplus_sample(const Args<T>& a, int64_t sample, int64_t slot, char* shared, Threads& threads) {
  using A = Acc<T>;
  const Block<T, Level> b(a, sample, slot, shared);
  threads.run([&](int t, A&) { b.load(t); });
  threads.run([&](int t, A&) { b.residual(t); });
  threads.run([&](int t, A&) { b.reduce_lanes(kH2 + 1, t); });
  threads.run([&](int t, A&) { b.reduce_sums(kH2 + 1, t); });
  const int across = b.s.Np / kStage, down = b.s.Mp / kStage;
  const int left = b.s.Mp / 4 * (b.s.q / 4), right = b.s.Np / 4 * (b.s.q / 4);
  for (int first = 0; first < left; first += a.plan.threads) {
    threads.run([&](int t, A& acc) {
      clear(acc);
      b.stage_columns(0, t);
      copies_landed();
    });
    for (int step = 0; step < across; ++step) {
      threads.run([&](int t, A& acc) { b.project(step, across, first + t, t, acc); });
    }
  }
  threads.run([&](int t, A&) { b.gram(t); });
  threads.run([&](int t, A&) { b.complete(t); });
  threads.run([&](int t, A&) { b.gaps(t); });
  threads.run([&](int t, A&) { b.reduce_lanes(kSums, t); });
  threads.run([&](int t, A&) { b.reduce_sums(kSums, t); });
  if constexpr (sizeof(T) == 4) {
    if (a.mean ? b.sums[kTies] != 0 : b.tied()) {
      for (int k = 0; k < a.r; ++k) {
        if (a.mean && !b.tied(k)) continue;
        threads.run([&](int t, A&) { b.tie_parts(k, t); });
        threads.run([&](int t, A&) { b.tie_lanes(t); });
        threads.run([&](int t, A&) { b.tie_gap(k, t); });
      }
      if (!a.mean) threads.run([&](int t, A&) { b.tie_norms(t); });
    }
  }
  threads.run([&](int t, A&) { b.coefficients(t); });
  const bool panels = a.gV != nullptr || a.gH != nullptr;
  if (a.gS != nullptr || a.gU != nullptr || panels) {
    threads.run([&](int t, A&) {
      if (a.gS != nullptr) b.spectrum(t);
      b.core(t);
    });
  }
  if (a.gU != nullptr) {
    threads.run([&](int t, A&) { b.template left_gradient<false>(t); });
    threads.run([&](int t, A&) { b.template couple<false>(t); });
    threads.run([&](int t, A&) { b.template left_gradient<true>(t); });
  }
  if (a.gV != nullptr) {
    // D waits in the place of the Gram matrices while U K is formed, then takes that of K
    threads.run([&](int t, A&) { b.template couple<true>(t); });
    threads.run([&](int t, A&) { b.copy_square(b.G, b.W, t); });
  }
  if (panels) threads.run([&](int t, A&) { b.turn(t); });
  if (a.gH != nullptr) threads.run([&](int t, A&) { b.channel_gradient(t); });
  if (a.gV != nullptr) {
    threads.run([&](int t, A&) {
      b.shift(t);
      b.copy_square(b.M, b.G, t);
    });
    for (int first = 0; first < right; first += a.plan.threads) {
      threads.run([&](int t, A& acc) {
        clear(acc);
        b.stage_rows(0, t);
        copies_landed();
      });
      for (int step = 0; step < down; ++step) {
        threads.run([&](int t, A& acc) { b.right_gradient(step, down, first + t, t, acc); });
      }
    }
  }
}

// Means of the terms over the batch in fixed order, and the loss; `sums` holds 5 values a thread.
constexpr int kMeanThreads = 256;

template <class T>
struct MeanArgs {
  const T* terms;
  const double* weights;
  T *loss, *means;
  int64_t batch;
};

template <class T, class Threads>
LOMACS_FN void aeplus_mean(const MeanArgs<T>& a, double* sums, Threads& threads) {
  threads.run([&](int t, Acc<T>&) {
    for (int k = 0; k < 5; ++k) {
      double sum = 0;
      for (int64_t b = t; b < a.batch; b += kMeanThreads) sum += double(a.terms[b * 5 + k]);
      sums[k * kMeanThreads + t] = sum;
    }
  });
  for (int half = kMeanThreads / 2; half > 0; half /= 2) {
    threads.run([&](int t, Acc<T>&) {
      if (t >= half) return;
      for (int k = 0; k < 5; ++k) sums[k * kMeanThreads + t] += sums[k * kMeanThreads + t + half];
    });
  }
  threads.run([&](int t, Acc<T>&) {
    if (t != 0) return;
    double mean[5];
    for (int k = 0; k < 5; ++k) {
      mean[k] = sums[k * kMeanThreads] / double(a.batch);
      a.means[k] = T(mean[k]);
    }
    *a.loss = T(mean[0] + a.weights[0] * mean[1] + a.weights[1] * mean[2] + a.weights[2] * mean[3] +
                a.weights[3] * mean[4]);
  });
}

}  // namespace lomacs::aeplus
