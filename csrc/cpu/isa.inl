// Compiles the file that LOMACS_KERNELS names once for every instruction set, each in a namespace of its own.
// The target is an attribute of every function, because templates are instantiated where no pragma holds.
// LOMACS_PRODUCTS real products make a complex one: three need three accumulators a number, and the loads of a
// third factor beside them, which pays where the registers are many.
#if defined(__x86_64__)

#define LOMACS_ISA avx512
#define LOMACS_BYTES 64
#define LOMACS_ROWS 4
#define LOMACS_VECS 2
#define LOMACS_PRODUCTS 3
#define LOMACS_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#include LOMACS_KERNELS
#undef LOMACS_ISA
#undef LOMACS_BYTES
#undef LOMACS_ROWS
#undef LOMACS_VECS
#undef LOMACS_PRODUCTS
#undef LOMACS_TARGET

#define LOMACS_ISA avx2
#define LOMACS_BYTES 32
#define LOMACS_ROWS 6
#define LOMACS_VECS 1
#define LOMACS_PRODUCTS 4
#define LOMACS_TARGET __attribute__((target("avx2,fma")))
#include LOMACS_KERNELS
#undef LOMACS_ISA
#undef LOMACS_BYTES
#undef LOMACS_ROWS
#undef LOMACS_VECS
#undef LOMACS_PRODUCTS
#undef LOMACS_TARGET

#endif

#define LOMACS_ISA portable
#define LOMACS_BYTES 16
#define LOMACS_ROWS 4
#define LOMACS_VECS 1
#define LOMACS_PRODUCTS 4
#define LOMACS_TARGET
#include LOMACS_KERNELS
#undef LOMACS_ISA
#undef LOMACS_BYTES
#undef LOMACS_ROWS
#undef LOMACS_VECS
#undef LOMACS_PRODUCTS
#undef LOMACS_TARGET
