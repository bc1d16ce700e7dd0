// lomacs::aeplus on CUDA: the loss, its five terms and the gradients in one launch over the samples and one
// small launch over their terms.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "aeplus_phases.cuh"
#include "device.cuh"

namespace lomacs::aeplus {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct DeviceThreads {
  Acc<T> acc;
  template <class Phase>
  __device__ __forceinline__ void run(Phase&& phase) {
    phase(static_cast<int>(threadIdx.x), acc);
    __syncthreads();
  }
};

template <class T, int Level>
__global__ void __launch_bounds__(thread_limit(sizeof(T), Level), 1) aeplus_fwd_kernel(const Args<T> args) {
  extern __shared__ __align__(16) char shared[];
  DeviceThreads<T> threads;
  for (int64_t sample = blockIdx.x; sample < args.batch; sample += gridDim.x) {
    aeplus_sample<T, Level>(args, sample, blockIdx.x, shared, threads);
  }
}

template <class T>
__global__ void __launch_bounds__(kMeanThreads) aeplus_mean_kernel(const MeanArgs<T> args) {
  __shared__ double sums[5 * kMeanThreads];
  DeviceThreads<T> threads;
  aeplus_mean(args, sums, threads);
}

void check(cudaError_t status, const char* what) { check_cuda(status, "aeplus", what); }

Plan plan_of(int64_t M, int64_t N, int64_t r, int element, int level) {
  return make_plan(M, N, r, element, thread_count(M, N, r, thread_limit(element, level)), level);
}

// the highest level whose layout fits `limit` bytes, or -1
int fitting_level(int64_t M, int64_t N, int64_t r, int element, int64_t limit) {
  int level = kMaxLevel;
  while (level >= 0 && plan_of(M, N, r, element, level).bytes > limit) --level;
  return level;
}

template <class T>
using Kernel = void (*)(const Args<T>);

template <class T>
Kernel<T> kernel_of(int level) {
  switch (level) {
    case 3: return aeplus_fwd_kernel<T, 3>;
    case 2: return aeplus_fwd_kernel<T, 2>;
    case 1: return aeplus_fwd_kernel<T, 1>;
    default: return aeplus_fwd_kernel<T, 0>;
  }
}

template <class T>
Cx<T>* complex_of(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<Cx<T>*>(x.mutable_data_ptr());
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Result launch(Tensor U, Tensor S, Tensor V, Tensor H, const Tensor& weights, bool mean, bool gu, bool gs, bool gv,
              bool gh) {
  const int64_t B = U.size(0), M = U.size(1), N = V.size(1), r = U.size(2);
  constexpr size_t c = sizeof(Cx<T>);
  U = aligned(U, c), V = aligned(V, c), H = aligned(H, c);
  const auto make = [&](bool wanted, const Tensor& like) {
    return wanted ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  Tensor gU = make(gu, U), gS = make(gs, S), gV = make(gv, V), gH = make(gh, H);
  Tensor loss = torch::stable::new_empty(S, {}), means = torch::stable::new_empty(S, {5});
  Tensor terms = torch::stable::new_empty(S, {B, 5});

  const int device = U.get_device_index();
  const OnDevice guard(device, "aeplus");
  const cudaStream_t stream = current_stream(device, "aeplus");
  if (B > 0) {
    int limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory limit");
    const int level = fitting_level(M, N, r, sizeof(T), limit);
    STD_TORCH_CHECK(level >= 0, "lomacs::aeplus: M=", M, " N=", N, " r=", r, " needs ",
                    plan_of(M, N, r, sizeof(T), 0).bytes, " bytes of shared memory, the device has ", limit);
    const Plan plan = plan_of(M, N, r, sizeof(T), level);
    const Kernel<T> kernel = kernel_of<T>(level);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes), "shared memory");
    // as many blocks as are resident together, so that the workspace stays in the L2 cache
    int processors = 0, resident = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.bytes), "occupancy");
    const int64_t blocks = std::min<int64_t>(B, int64_t(processors) * std::max(resident, 1));
    const Tensor work = torch::stable::new_empty(S, {blocks, plan.far, 2});
    Args<T> args{};
    args.U = complex_of<T>(U), args.V = complex_of<T>(V), args.H = complex_of<T>(H);
    args.S = static_cast<const T*>(S.const_data_ptr());
    args.weights = static_cast<const double*>(weights.const_data_ptr());
    args.gU = complex_of<T>(gU), args.gV = complex_of<T>(gV), args.gH = complex_of<T>(gH);
    args.gS = gs ? static_cast<T*>(gS.mutable_data_ptr()) : nullptr;
    args.terms = static_cast<T*>(terms.mutable_data_ptr());
    args.work = complex_of<T>(work);
    args.batch = B;
    args.plan = plan;
    args.M = static_cast<int>(M), args.N = static_cast<int>(N), args.r = static_cast<int>(r);
    args.mean = mean;
    const auto wide = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; };
    args.wide_panel = r % 2 == 0 && wide(U) && wide(V);
    args.wide_H = N % 2 == 0 && wide(H);
    kernel<<<static_cast<unsigned>(blocks), plan.threads, plan.bytes, stream>>>(args);
    check(cudaGetLastError(), "launch");
  }
  const MeanArgs<T> last{static_cast<const T*>(terms.const_data_ptr()),
                         static_cast<const double*>(weights.const_data_ptr()),
                         static_cast<T*>(loss.mutable_data_ptr()), static_cast<T*>(means.mutable_data_ptr()), B};
  aeplus_mean_kernel<T><<<1, kMeanThreads, 0, stream>>>(last);
  check(cudaGetLastError(), "launch");
  return {loss, means, gU, gS, gV, gH};
}

Result aeplus(Tensor U, Tensor S, Tensor V, Tensor H, Tensor weights, bool mean, bool gu, bool gs, bool gv, bool gh) {
  STD_TORCH_CHECK(U.dim() == 4 && V.dim() == 4 && H.dim() == 4 && S.dim() == 2,
                  "lomacs::aeplus: expected U (B, M, r, 2), S (B, r), V (B, N, r, 2), H (B, M, N, 2)");
  const int64_t B = U.size(0), M = U.size(1), N = V.size(1), r = U.size(2);
  STD_TORCH_CHECK(U.size(3) == 2 && V.size(0) == B && V.size(2) == r && V.size(3) == 2 && H.size(0) == B &&
                      H.size(1) == M && H.size(2) == N && H.size(3) == 2 && S.size(0) == B && S.size(1) == r,
                  "lomacs::aeplus: expected U (B, M, r, 2), S (B, r), V (B, N, r, 2), H (B, M, N, 2)");
  STD_TORCH_CHECK(M > 0 && N > 0 && r > 0, "lomacs::aeplus: M, N and r must be positive");
  // sizes beyond this fit no device, and every index within a sample stays below 2^31
  STD_TORCH_CHECK(M <= 16384 && N <= 16384 && r <= 1024, "lomacs::aeplus: M=", M, " N=", N, " r=", r,
                  " is beyond M, N <= 16384, r <= 1024");
  const ScalarType type = S.scalar_type();
  STD_TORCH_CHECK(U.scalar_type() == type && V.scalar_type() == type && H.scalar_type() == type,
                  "lomacs::aeplus: U, S, V and H must have one dtype");
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == 4 && weights.scalar_type() == ScalarType::Double,
                  "lomacs::aeplus: weights must be 4 float64");
  check_placed("aeplus", {&U, &S, &V, &H, &weights});
  if (type == ScalarType::Float) return launch<float>(U, S, V, H, weights, mean, gu, gs, gv, gh);
  STD_TORCH_CHECK(type == ScalarType::Double, "lomacs::aeplus: dtype must be float32 or float64");
  return launch<double>(U, S, V, H, weights, mean, gu, gs, gv, gh);
}

}  // namespace
}  // namespace lomacs::aeplus

// Bytes of shared memory of the layout that a device with `limit` bytes a block takes; above `limit` when none
// fits.
extern "C" __attribute__((visibility("default"))) int64_t lomacs_cuda_aeplus_shared_bytes(int64_t M, int64_t N,
                                                                                           int64_t r, int64_t element,
                                                                                           int64_t limit) {
  using namespace lomacs::aeplus;
  const int level = fitting_level(M, N, r, int(element), limit);
  return plan_of(M, N, r, int(element), level < 0 ? 0 : level).bytes;
}

STABLE_TORCH_LIBRARY_IMPL(lomacs, CUDA, m) { m.impl("aeplus", TORCH_BOX(&lomacs::aeplus::aeplus)); }
