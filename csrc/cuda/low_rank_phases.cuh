// The low-rank objective of a batch with its gradients, as phases between barriers. The same source is the body of
// the two kernels of low_rank.cu and runs on the host, where a phase is called for one thread after the other.
//
// With W = H F, Z = H^H G, Gf = F^H F, Gg = G^H G, column weights w, a mask m of pairs, and s = (rows / M)
// (columns / N) for a block sampled from a larger matrix:
//   loss = s (sum_ij m_ij Re Gf_ij conj(Gg_ij) - 2 sum_k w_k Re <G_k, W_k>)
//   gF = 2 s (F (m Gg) - Z w),   gG = 2 s (G (m Gf) - W w),   gH = -2 s G w F^H
// joint: w_k = (L - k) / L, m_ij = w_max(i, j); sequential: m of the gradients is 1 on and above the diagonal,
// elsewhere all are 1.
//
// First launch: a block an item, i.e. a tile of 64 rows and C columns of W, Z, Gf or Gg, over one part of the summed
// index. Tiles of W leave their part of the first term. Second launch: a block a tile of a gradient, or the loss of a
// matrix; the parts are added in their order. The first part of W and Z lives where gG and gF will, other parts and
// the Gram matrices in a workspace.
//
// A thread holds 4 x 4 outputs. Both factors pass through shared memory by stages of 8 summed indices, two buffers,
// with the summed index first: 16-byte reads whatever the layout in global memory. Shared memory in bytes, e an
// element: 16 (64 + C) e + 512 for the padding + 32 C, at most 26,112 (complex float64).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "phases.cuh"

namespace lomacs::low_rank {

constexpr int kRows = 64;     // rows of a tile
constexpr int kDepth = 8;     // summed indices of a stage
constexpr int kChain = 16;    // stages of one chain of float32 sums
constexpr int kPart = 256;    // summed indices of a part, more where there would be more than kParts
constexpr int kParts = 8;

enum class Nesting : int { none, joint, sequential };

template <class E>
struct RealOf {
  using type = E;
};
template <class T>
struct RealOf<Cx<T>> {
  using type = T;
};
template <class E>
using Real = typename RealOf<E>::type;

// elements of 16 bytes
template <class E>
constexpr int kVec = 16 / int(sizeof(E));

template <class E>
struct alignas(16) Vec {
  E x[kVec<E>];
};

// 4 x 4 outputs of one thread: the running chain, and the chains before it
template <class E>
struct Sums {
  E chain[4][4], total[4][4];
};

template <class E, int C>
struct alignas(16) Shared {
  E left[2][kDepth][kRows + kVec<E>], right[2][kDepth][C + kVec<E>];
  double sums[4 * C];
};

// C threads across by 16 down in tiles of 4 x 4
template <int C>
constexpr int kThreads = 4 * C;

// Sizes, items and the order of the workspace, in elements, all of one matrix.
struct Plan {
  int64_t B, M, N, L;
  int64_t part_M, part_N, parts_M, parts_N;
  int64_t tiles_M, tiles_N, tiles_L, strips_N, strips_L;
  int64_t items_W, items_Z, items_Gf, items_Gg, products;
  int64_t items_gG, items_gF, items_gH, gradients;
  int64_t Z, Gf, Gg, work;
};

template <class E>
struct Args {
  const E *F, *G, *H;
  E *gF, *gG, *gH;      // null where not wanted
  Real<E>* loss;
  E* work;              // plan.work a matrix
  double* cross;        // plan.items_W a matrix
  Plan plan;
  double scale;
  Nesting nesting;
  bool wide_L, wide_N;  // rows of L, of N, start on 16 bytes
};

inline int64_t up(int64_t x, int64_t n) { return (x + n - 1) / n; }

inline Plan make_plan(int64_t B, int64_t M, int64_t N, int64_t L, int columns, bool gf, bool gg, bool gh) {
  Plan p{};
  p.B = B, p.M = M, p.N = N, p.L = L;
  const auto part = [](int64_t n) {
    const int64_t least = up(up(n, kParts), kDepth) * kDepth;
    return least > kPart ? least : int64_t(kPart);
  };
  p.part_M = part(M), p.part_N = part(N);
  p.parts_M = up(M, p.part_M), p.parts_N = up(N, p.part_N);
  p.tiles_M = up(M, kRows), p.tiles_N = up(N, kRows), p.tiles_L = up(L, kRows);
  p.strips_N = up(N, columns), p.strips_L = up(L, columns);
  p.items_W = p.tiles_M * p.strips_L * p.parts_N;
  p.items_Z = gf ? p.tiles_N * p.strips_L * p.parts_M : 0;
  p.items_Gf = p.tiles_L * p.strips_L * p.parts_N;
  p.items_Gg = p.tiles_L * p.strips_L * p.parts_M;
  p.products = p.items_W + p.items_Z + p.items_Gf + p.items_Gg;
  p.items_gG = gg ? p.tiles_M * p.strips_L : 0;
  p.items_gF = gf ? p.tiles_N * p.strips_L : 0;
  p.items_gH = gh ? p.tiles_M * p.strips_N : 0;
  p.gradients = 1 + p.items_gG + p.items_gF + p.items_gH;
  p.Z = gg ? (p.parts_N - 1) * M * L : 0;
  p.Gf = p.Z + (gf ? (p.parts_M - 1) * N * L : 0);
  p.Gg = p.Gf + p.parts_N * L * L;
  p.work = p.Gg + p.parts_M * L * L;
  return p;
}

#ifdef __CUDACC__
// 16 bytes as the instructions take them: of float64 through float4 they would pass through the stack
template <class T>
struct RawOf {
  using type = float4;
};
template <>
struct RawOf<double> {
  using type = double2;
};
template <class E>
using Raw = typename RawOf<Real<E>>::type;
#endif

template <class E>
LOMACS_FN Vec<E> load(const E* p) {
  Vec<E> v;
#ifdef __CUDACC__
  const Raw<E> raw = *reinterpret_cast<const Raw<E>*>(p);
  memcpy(&v, &raw, 16);
#else
  std::memcpy(&v, p, 16);
#endif
  return v;
}

template <class E>
LOMACS_FN void store(E* p, const Vec<E>& v) {
#ifdef __CUDACC__
  Raw<E> raw;
  memcpy(&raw, &v, 16);
  *reinterpret_cast<Raw<E>*>(p) = raw;
#else
  std::memcpy(p, &v, 16);
#endif
}

// The same to global memory: opaque, or the compiler splits it to share code with the narrow stores beside it.
template <class E>
LOMACS_FN void store_global(E* p, const Vec<E>& v) {
#ifdef __CUDA_ARCH__
  Raw<E> raw;
  memcpy(&raw, &v, 16);
  const size_t to = __cvta_generic_to_global(p);
  if constexpr (sizeof(Real<E>) == 4) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(raw.x), "f"(raw.y), "f"(raw.z), "f"(raw.w)
                 : "memory");
  } else {
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(to), "d"(raw.x), "d"(raw.y) : "memory");
  }
#else
  store(p, v);
#endif
}

// a vector of a row of `end` elements in global memory, zero outside
template <class E>
LOMACS_FN Vec<E> read(const E* row, int64_t at, int64_t end, bool wide) {
  if (wide) return at < end ? load(row + at) : Vec<E>{};
  Vec<E> v{};
  LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) {
    if (at + u < end) v.x[u] = row[at + u];
  }
  return v;
}

template <class E>
LOMACS_FN void write(E* row, int64_t at, int64_t end, bool wide, const Vec<E>& v) {
  if (wide) {
    if (at < end) store_global(row + at, v);
    return;
  }
  LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) {
    if (at + u < end) row[at + u] = v.x[u];
  }
}

template <class T>
LOMACS_FN void add(T& c, const T& a) {
  c += a;
}
template <class T>
LOMACS_FN void add(Cx<T>& c, const Cx<T>& a) {
  c.re += a.re;
  c.im += a.im;
}

template <class T>
LOMACS_FN void add_product(T& c, const T& a, const T& b) {
  c += a * b;
}
template <class T>
LOMACS_FN void add_product(Cx<T>& c, const Cx<T>& a, const Cx<T>& b) {
  c.re += a.re * b.re;
  c.re -= a.im * b.im;
  c.im += a.re * b.im;
  c.im += a.im * b.re;
}

template <class T>
LOMACS_FN void add_scaled(T& c, T s, const T& a) {
  c += s * a;
}
template <class T>
LOMACS_FN void add_scaled(Cx<T>& c, T s, const Cx<T>& a) {
  c.re += s * a.re;
  c.im += s * a.im;
}

template <class T>
LOMACS_FN void scale_by(T& x, T s) {
  x *= s;
}
template <class T>
LOMACS_FN void scale_by(Cx<T>& x, T s) {
  x.re *= s;
  x.im *= s;
}

template <class T>
LOMACS_FN void conjugate(T&) {}
template <class T>
LOMACS_FN void conjugate(Cx<T>& x) {
  x.im = -x.im;
}

// Re conj(a) b
template <class T>
LOMACS_FN T dot(const T& a, const T& b) {
  return a * b;
}
template <class T>
LOMACS_FN T dot(const Cx<T>& a, const Cx<T>& b) {
  return a.re * b.re + a.im * b.im;
}

// A thread's four rows or columns of `Width`: vectors that stand apart, so that neighbours' accesses join.
template <int Width, class E>
LOMACS_FN int first_of(int tile, int h) {
  return kVec<E> * (tile + h * (Width / 4));
}

template <int Width, class E>
LOMACS_FN void pick(const E* row, int tile, E (&out)[4]) {
  constexpr int V = kVec<E>;
  LOMACS_UNROLL for (int h = 0; h < 4 / V; ++h) {
    const Vec<E> v = load(row + first_of<Width, E>(tile, h));
    LOMACS_UNROLL for (int u = 0; u < V; ++u) out[V * h + u] = v.x[u];
  }
}

// A factor of a product in global memory, row-major: the summed index along the rows, or down the columns.
template <class E>
struct Factor {
  const E* x;
  int64_t ld, first, count, end;  // of the other index: the tile's first, how many; of the summed one: the end
  bool along, wide, conj;

  LOMACS_FN Vec<E> line(int64_t row, int64_t at, int64_t columns) const {
    return read(x + row * ld, at, columns, wide);
  }
  LOMACS_FN void finish(Vec<E>& v, int64_t, int64_t) const {
    if (!conj) return;
    LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) conjugate(v.x[u]);
  }
};

// The weights of columns and pairs.
template <class T>
struct Weights {
  Nesting nesting;
  int64_t L;

  LOMACS_FN T of(int64_t k) const { return nesting == Nesting::joint ? T(L - k) / T(L) : T(1); }
  LOMACS_FN T pair(int64_t i, int64_t j) const { return of(i > j ? i : j); }
  // of column i in the gradient of column j
  LOMACS_FN T mask(int64_t i, int64_t j) const {
    return nesting == Nesting::sequential ? T(i <= j) : pair(i, j);
  }
};

// The right factor of a gradient: a masked Gram matrix in parts, or weighted F^H.
template <class E>
struct Coupled : Factor<E> {
  Weights<Real<E>> weights;
  Real<E> scale;
  int64_t parts, stride;

  LOMACS_FN Vec<E> line(int64_t row, int64_t at, int64_t columns) const {
    Vec<E> v = Factor<E>::line(row, at, columns);
    LOMACS_ROLLED for (int64_t p = 1; p < parts; ++p) {
      const Vec<E> w = read(this->x + p * stride + row * this->ld, at, columns, this->wide);
      LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) add(v.x[u], w.x[u]);
    }
    return v;
  }
  LOMACS_FN void finish(Vec<E>& v, int64_t k, int64_t j) const {
    Factor<E>::finish(v, k, j);
    LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) {
      scale_by(v.x[u], scale * (this->along ? weights.of(k + u) : weights.mask(k, j + u)));
    }
  }
};

template <class E, int Width, int Threads>
struct Stage {
  static constexpr int V = kVec<E>, vectors = kDepth * Width / V, each = (vectors + Threads - 1) / Threads;
  Vec<E> held[each];

  template <class From>
  LOMACS_FN void fetch(const From& from, int64_t start, int t) {
    LOMACS_UNROLL for (int u = 0; u < each; ++u) {
      const int x = t + u * Threads;
      held[u] = Vec<E>{};
      if (vectors % Threads != 0 && x >= vectors) continue;
      if (from.along) {
        const int64_t k = start + V * (x % (kDepth / V)), i = from.first + x / (kDepth / V);
        if (i < from.count) held[u] = from.line(i, k, from.end);
        from.finish(held[u], k, i);
      } else {
        const int64_t k = start + x / (Width / V), i = from.first + V * (x % (Width / V));
        if (k < from.end) held[u] = from.line(k, i, from.count);
        from.finish(held[u], k, i);
      }
    }
  }

  LOMACS_FN void put(E (*to)[Width + V], bool along, int t) const {
    LOMACS_UNROLL for (int u = 0; u < each; ++u) {
      const int x = t + u * Threads;
      if (vectors % Threads != 0 && x >= vectors) continue;
      if (along) {
        LOMACS_UNROLL for (int v = 0; v < V; ++v) to[V * (x % (kDepth / V)) + v][x / (kDepth / V)] = held[u].x[v];
      } else {
        store(&to[x / (Width / V)][V * (x % (Width / V))], held[u]);
      }
    }
  }
};

template <class E>
LOMACS_FN void clear(E (&x)[4][4]) {
  LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
    LOMACS_UNROLL for (int q = 0; q < 4; ++q) x[p][q] = E{};
  }
}

// float64 needs no second sum, and would not have the registers
template <class E>
LOMACS_FN void end_chain(Sums<E>& sums) {
  if constexpr (sizeof(Real<E>) == 4) {
    LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
      LOMACS_UNROLL for (int q = 0; q < 4; ++q) add(sums.total[p][q], sums.chain[p][q]);
    }
    clear(sums.chain);
  }
}

template <class E>
LOMACS_FN E& sum_of(Sums<E>& sums, int p, int q) {
  if constexpr (sizeof(Real<E>) == 4) {
    return sums.total[p][q];
  } else {
    return sums.chain[p][q];
  }
}

// sums = left right over the summed index from `start` on
template <class E, int C, class Right, class Threads>
LOMACS_FN void multiply(const Factor<E>& left, const Right& right, int64_t start, Shared<E, C>& s,
                        Threads& threads) {
  const int64_t steps = (left.end - start + kDepth - 1) / kDepth;
  threads.run([&](int t, Sums<E>& sums) {
    clear(sums.chain);
    if constexpr (sizeof(Real<E>) == 4) clear(sums.total);
    Stage<E, kRows, kThreads<C>> a;
    Stage<E, C, kThreads<C>> b;
    a.fetch(left, start, t);
    b.fetch(right, start, t);
    a.put(s.left[0], left.along, t);
    b.put(s.right[0], right.along, t);
  });
  LOMACS_ROLLED for (int64_t step = 0; step < steps; ++step) {
    threads.run([&](int t, Sums<E>& sums) {
      const int now = int(step & 1);
      const bool more = step + 1 < steps;
      Stage<E, kRows, kThreads<C>> a;
      Stage<E, C, kThreads<C>> b;
      if (more) {
        a.fetch(left, start + (step + 1) * kDepth, t);
        b.fetch(right, start + (step + 1) * kDepth, t);
      }
      const int y = t / (C / 4), z = t % (C / 4);
#ifdef __CUDACC__
#pragma unroll 2
#endif
      for (int k = 0; k < kDepth; ++k) {
        E x[4], w[4];
        pick<kRows>(s.left[now][k], y, x);
        pick<C>(s.right[now][k], z, w);
        LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
          LOMACS_UNROLL for (int q = 0; q < 4; ++q) add_product(sums.chain[p][q], x[p], w[q]);
        }
      }
      if (step % kChain == kChain - 1 || !more) end_chain(sums);
      if (more) {
        a.put(s.left[1 - now], left.along, t);
        b.put(s.right[1 - now], right.along, t);
      }
    });
  }
}

// `visit(row, column, vector)` for what a thread holds of a tile that starts at (i0, j0), rows below `rows`
template <int C, class E, class Visit>
LOMACS_FN void for_outputs(Sums<E>& sums, int64_t i0, int64_t j0, int64_t rows, int t, Visit&& visit) {
  constexpr int V = kVec<E>;
  const int y = t / (C / 4), z = t % (C / 4);
  LOMACS_UNROLL for (int p = 0; p < 4; ++p) {
    const int64_t i = i0 + first_of<kRows, E>(y, p / V) + p % V;
    if (i >= rows) continue;
    LOMACS_UNROLL for (int h = 0; h < 4 / V; ++h) {
      Vec<E> v;
      LOMACS_UNROLL for (int u = 0; u < V; ++u) v.x[u] = sum_of(sums, p, V * h + u);
      visit(i, j0 + first_of<C, E>(z, h), v);
    }
  }
}

// s.sums added up in fixed order, the sum in the first
template <class E, int C, class Threads>
LOMACS_FN void reduce(Shared<E, C>& s, Threads& threads) {
  for (int half = kThreads<C> / 2; half > 0; half /= 2) {
    threads.run([&](int t, Sums<E>&) {
      if (t < half) s.sums[t] += s.sums[t + half];
    });
  }
}

// An item of the first launch.
template <class E, int C, class Threads>
LOMACS_FN void product_item(const Args<E>& a, int64_t item, Shared<E, C>& s, Threads& threads) {
  const Plan& p = a.plan;
  const int64_t b = item / p.products, own = item % p.products, L = p.L;
  const E *F = a.F + b * p.N * L, *G = a.G + b * p.M * L, *H = a.H + b * p.M * p.N;
  E* const work = a.work + b * p.work;
  int64_t x = own;
  const bool of_W = x < p.items_W;
  if (!of_W) x -= p.items_W;
  const bool of_Z = !of_W && x < p.items_Z;
  if (!of_W && !of_Z) x -= p.items_Z;
  const bool of_Gf = !of_W && !of_Z && x < p.items_Gf;
  if (!of_W && !of_Z && !of_Gf) x -= p.items_Gf;

  // W and Gf sum over N, Z and Gg over M
  const bool over_N = of_W || of_Gf;
  const int64_t parts = over_N ? p.parts_N : p.parts_M, length = over_N ? p.part_N : p.part_M;
  const int64_t whole = over_N ? p.N : p.M;
  const int64_t part = x % parts, tile = x / parts, i0 = tile / p.strips_L * kRows, j0 = tile % p.strips_L * C;
  const int64_t start = part * length, end = start + length < whole ? start + length : whole;
  const int64_t rows = of_W ? p.M : of_Z ? p.N : L;
  const E* const right = over_N ? F : G;
  E* out;
  if (of_W) {
    out = a.gG == nullptr ? nullptr : part == 0 ? a.gG + b * p.M * L : work + (part - 1) * p.M * L;
  } else if (of_Z) {
    out = part == 0 ? a.gF + b * p.N * L : work + p.Z + (part - 1) * p.N * L;
  } else {
    out = work + (of_Gf ? p.Gf : p.Gg) + part * L * L;
  }
  const Factor<E> left{of_W || of_Z ? H : right, of_W || of_Z ? p.N : L, i0, rows, end, of_W,
                       of_W || of_Z ? a.wide_N : a.wide_L, !of_W};
  multiply(left, Factor<E>{right, L, j0, L, end, false, a.wide_L, false}, start, s, threads);

  threads.run([&](int t, Sums<E>& sums) {
    const Weights<Real<E>> weights{a.nesting, L};
    Real<E> cross = 0;
    for_outputs<C>(sums, i0, j0, rows, t, [&](int64_t i, int64_t j, const Vec<E>& v) {
      if (out != nullptr) write(out + i * L, j, L, a.wide_L, v);
      if (!of_W) return;
      const Vec<E> g = read(G + i * L, j, L, a.wide_L);
      LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) {
        cross += j + u < L ? weights.of(j + u) * dot(g.x[u], v.x[u]) : Real<E>(0);
      }
    });
    s.sums[t] = double(cross);
  });
  if (!of_W) return;
  reduce(s, threads);
  threads.run([&](int t, Sums<E>&) {
    if (t == 0) a.cross[b * p.items_W + own] = s.sums[0];
  });
}

template <class E>
LOMACS_FN E sum_of_parts(const E* x, int64_t parts, int64_t stride) {
  E sum = x[0];
  LOMACS_ROLLED for (int64_t p = 1; p < parts; ++p) add(sum, x[p * stride]);
  return sum;
}

template <class E, int C, class Threads>
LOMACS_FN void loss_item(const Args<E>& a, int64_t b, Shared<E, C>& s, Threads& threads) {
  const Plan& p = a.plan;
  threads.run([&](int t, Sums<E>&) {
    const Weights<Real<E>> weights{a.nesting, p.L};
    const int64_t square = p.L * p.L;
    const E *Gf = a.work + b * p.work + p.Gf, *Gg = a.work + b * p.work + p.Gg;
    double sum = 0;
    LOMACS_ROLLED for (int64_t x = t; x < p.items_W; x += kThreads<C>) sum -= 2 * a.cross[b * p.items_W + x];
    LOMACS_ROLLED for (int64_t x = t; x < square; x += kThreads<C>) {
      const Real<E> both = dot(sum_of_parts(Gf + x, p.parts_N, square), sum_of_parts(Gg + x, p.parts_M, square));
      sum += double(weights.pair(x / p.L, x % p.L) * both);
    }
    s.sums[t] = a.scale * sum;
  });
  reduce(s, threads);
  threads.run([&](int t, Sums<E>&) {
    if (t == 0) a.loss[b] = Real<E>(s.sums[0]);
  });
}

// An item of the second launch.
template <class E, int C, class Threads>
LOMACS_FN void gradient_item(const Args<E>& a, int64_t item, Shared<E, C>& s, Threads& threads) {
  const Plan& p = a.plan;
  const int64_t b = item / p.gradients, L = p.L;
  int64_t x = item % p.gradients;
  if (x-- == 0) {
    loss_item(a, b, s, threads);
    return;
  }
  const E *F = a.F + b * p.N * L, *G = a.G + b * p.M * L;
  const E* const work = a.work + b * p.work;
  const bool of_G = x < p.items_gG;
  if (!of_G) x -= p.items_gG;
  const bool of_F = !of_G && x < p.items_gF;
  if (!of_G && !of_F) x -= p.items_gF;
  const bool of_H = !of_G && !of_F;

  const int64_t strips = of_H ? p.strips_N : p.strips_L;
  const int64_t i0 = x / strips * kRows, j0 = x % strips * C, rows = of_F ? p.N : p.M;
  const Real<E> twice = Real<E>(2 * a.scale);
  const Weights<Real<E>> weights{a.nesting, L};
  Coupled<E> right;
  right.x = of_H ? F : work + (of_G ? p.Gf : p.Gg);
  right.ld = L, right.first = j0, right.count = of_H ? p.N : L, right.end = L;
  right.along = of_H, right.wide = a.wide_L, right.conj = of_H;
  right.weights = weights, right.scale = of_H ? -twice : twice;
  right.parts = of_H ? 1 : of_G ? p.parts_N : p.parts_M, right.stride = L * L;
  multiply(Factor<E>{of_F ? F : G, L, i0, rows, L, true, a.wide_L, false}, right, 0, s, threads);

  const int64_t width = of_H ? p.N : L;
  const bool wide = of_H ? a.wide_N : a.wide_L;
  E* const out = (of_H ? a.gH : of_G ? a.gG : a.gF) + b * rows * width;
  const E* const others = work + (of_G ? 0 : p.Z);
  const int64_t parts = of_G ? p.parts_N : p.parts_M;
  threads.run([&](int t, Sums<E>& sums) {
    for_outputs<C>(sums, i0, j0, rows, t, [&](int64_t i, int64_t j, Vec<E>& v) {
      if (!of_H) {
        Vec<E> w = read(out + i * L, j, L, wide);
        LOMACS_ROLLED for (int64_t k = 1; k < parts; ++k) {
          const Vec<E> next = read(others + ((k - 1) * rows + i) * L, j, L, wide);
          LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) add(w.x[u], next.x[u]);
        }
        LOMACS_UNROLL for (int u = 0; u < kVec<E>; ++u) {
          add_scaled(v.x[u], -twice * weights.of(j + u), w.x[u]);
        }
      }
      write(out + i * width, j, width, wide, v);
    });
  });
}

}  // namespace lomacs::low_rank
