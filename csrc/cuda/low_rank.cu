// lomacs::low_rank on CUDA: the low-rank objective of every matrix and its gradients, in one launch over the products
// and one over the gradients.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "device.cuh"
#include "low_rank_phases.cuh"

namespace lomacs::low_rank {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class E>
struct DeviceThreads {
  Sums<E> sums;
  template <class Phase>
  __device__ __forceinline__ void run(Phase&& phase) {
    phase(static_cast<int>(threadIdx.x), sums);
    __syncthreads();
  }
};

// blocks a multiprocessor, which bounds the registers: 128 a thread for real float32, 168 for complex
template <class E, int C>
constexpr int kResident = sizeof(Real<E>) == 8 ? 1 : (sizeof(E) == 4 ? 512 : 384) / kThreads<C>;

template <class E, int C>
__global__ void __launch_bounds__(kThreads<C>, kResident<E, C>) low_rank_products_kernel(const Args<E> args) {
  __shared__ Shared<E, C> shared;
  DeviceThreads<E> threads;
  const int64_t items = args.plan.B * args.plan.products;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) product_item(args, item, shared, threads);
}

template <class E, int C>
__global__ void __launch_bounds__(kThreads<C>, kResident<E, C>) low_rank_gradients_kernel(const Args<E> args) {
  __shared__ Shared<E, C> shared;
  DeviceThreads<E> threads;
  const int64_t items = args.plan.B * args.plan.gradients;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) gradient_item(args, item, shared, threads);
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class E>
E* elements(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<E*>(x.mutable_data_ptr());
}

struct Call {
  Tensor F, G, H;
  double scale;
  Nesting nesting;
  bool gf, gg, gh;
};

template <class E, int C>
Result launch(const Call& call) {
  const Tensor F = aligned(call.F, sizeof(E)), G = aligned(call.G, sizeof(E)), H = aligned(call.H, sizeof(E));
  const int64_t B = H.size(0), M = H.size(1), N = H.size(2), L = F.size(2);
  const auto make = [&](bool wanted, const Tensor& like) {
    return wanted ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  const Tensor gF = make(call.gf, F), gG = make(call.gg, G), gH = make(call.gh, H);
  const Tensor loss = torch::stable::new_empty(H, {B});
  if (B == 0) return {loss, gF, gG, gH};

  const int device = H.get_device_index();
  const OnDevice guard(device, "low_rank");
  const cudaStream_t stream = current_stream(device, "low_rank");
  Args<E> args{};
  args.plan = make_plan(B, M, N, L, C, call.gf, call.gg, call.gh);
  const Plan& plan = args.plan;
  const Tensor work =
      torch::stable::new_empty(H, {B, plan.work, int64_t(sizeof(E) / sizeof(Real<E>))});
  const Tensor cross = torch::stable::new_empty(H, {B, plan.items_W}, ScalarType::Double);
  args.F = elements<E>(F), args.G = elements<E>(G), args.H = elements<E>(H);
  args.gF = elements<E>(gF), args.gG = elements<E>(gG), args.gH = elements<E>(gH);
  args.loss = elements<Real<E>>(loss), args.work = elements<E>(work), args.cross = elements<double>(cross);
  args.scale = call.scale, args.nesting = call.nesting;
  const auto on_16 = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; };
  args.wide_L = L % kVec<E> == 0 && on_16(F) && on_16(G);
  args.wide_N = N % kVec<E> == 0 && on_16(H);
  const auto blocks = [](int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, 0x7fffffff)); };
  low_rank_products_kernel<E, C><<<blocks(B * plan.products), kThreads<C>, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "low_rank", "launch");
  low_rank_gradients_kernel<E, C><<<blocks(B * plan.gradients), kThreads<C>, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "low_rank", "launch");
  return {loss, gF, gG, gH};
}

Result low_rank(Tensor F, Tensor G, Tensor H, int64_t rows, int64_t columns, int64_t nesting, bool gf, bool gg,
                bool gh) {
  const bool complex = H.dim() == 4;
  STD_TORCH_CHECK((H.dim() == 3 || complex) && F.dim() == H.dim() && G.dim() == H.dim(),
                  "lomacs::low_rank: expected F (B, N, L), G (B, M, L), H (B, M, N), all with a last dimension of 2 "
                  "where complex");
  const int64_t B = H.size(0), M = H.size(1), N = H.size(2), L = F.size(2);
  bool right = F.size(0) == B && F.size(1) == N && G.size(0) == B && G.size(1) == M && G.size(2) == L;
  if (complex) right = right && F.size(3) == 2 && G.size(3) == 2 && H.size(3) == 2;
  STD_TORCH_CHECK(right, "lomacs::low_rank: expected F (B, N, L), G (B, M, L), H (B, M, N), all with a last dimension "
                         "of 2 where complex");
  STD_TORCH_CHECK(M > 0 && N > 0 && L > 0, "lomacs::low_rank: no dimension but the batch may be empty");
  STD_TORCH_CHECK(rows >= M && columns >= N, "lomacs::low_rank: rows and columns must be at least those of H");
  STD_TORCH_CHECK(nesting >= 0 && nesting < 3, "lomacs::low_rank: nesting must be 0, 1 or 2, got ", nesting);
  const ScalarType type = H.scalar_type();
  STD_TORCH_CHECK(F.scalar_type() == type && G.scalar_type() == type,
                  "lomacs::low_rank: F, G and H must have one dtype");
  check_placed("low_rank", {&F, &G, &H});
  const double scale = double(rows) / double(M) * (double(columns) / double(N));
  const Call call{F, G, H, scale, static_cast<Nesting>(nesting), gf, gg, gh};
  if (type == ScalarType::Float) {
    if (L <= 16) return complex ? launch<Cx<float>, 16>(call) : launch<float, 16>(call);
    return complex ? launch<Cx<float>, 32>(call) : launch<float, 32>(call);
  }
  STD_TORCH_CHECK(type == ScalarType::Double, "lomacs::low_rank: dtype must be float32 or float64");
  return complex ? launch<Cx<double>, 32>(call) : launch<double, 32>(call);
}

}  // namespace
}  // namespace lomacs::low_rank

STABLE_TORCH_LIBRARY_IMPL(lomacs, CUDA, m) { m.impl("low_rank", TORCH_BOX(&lomacs::low_rank::low_rank)); }
