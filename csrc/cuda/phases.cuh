// What phases between barriers share: marks of functions that run on device and host, and complex numbers.
#pragma once

#ifdef __CUDACC__
#define LOMACS_FN __device__ __forceinline__
#define LOMACS_UNROLL _Pragma("unroll")
#define LOMACS_ROLLED _Pragma("unroll 1")
#else
#define LOMACS_FN inline
#define LOMACS_UNROLL
#define LOMACS_ROLLED
#endif

namespace lomacs {

template <class T>
struct alignas(2 * sizeof(T)) Cx {
  T re, im;
};

}  // namespace lomacs
