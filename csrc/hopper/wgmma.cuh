// Hopper's warpgroup products, d [64][n] = or += a [64][16] b [16][n]: a held in registers or shared, b shared.
//
// A descriptor names columns of a Tile from some row and column on. Where the product sums over a tile's columns (b's
// columns are the tile's rows) b is kAcross, and the next 16 to sum over are 16 columns on; where it sums over the tile's
// rows b is kAlong, and they are 16 rows on. Where `add` is 0, d need not be set before.
// d's registers, and a's, are those of mma.m16n8k16: warp w of the group has the rows 16 w and on.
#pragma once

#include "hopper/device.cuh"

namespace nam56r {

__device__ inline void start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void close() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewer = 0>  // all but the groups closed last
__device__ inline void settle() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kNewer) : "memory"); }
__device__ inline void finish() { close(), settle(); }
// Registers that products read as they run: nothing else may lie in them until then.
template <int n>
__device__ __forceinline__ void keep(unsigned (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
}
// Results that products wrote, after settle: nothing reads them before.
template <int n>
__device__ __forceinline__ void keep(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]) :: "memory");
}
// What ordinary stores wrote to shared memory is there for the products of threads past the next barrier.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

constexpr int kAcross = 0, kAlong = 1;

template <typename T, int n> struct Product;

#define NAM56R_D(is, i) is(d[i][0]), is(d[i][1]), is(d[i][2]), is(d[i][3])
#define NAM56R_D8(is) NAM56R_D(is, 0)
#define NAM56R_D16(is) NAM56R_D8(is), NAM56R_D(is, 1)
#define NAM56R_D32(is) NAM56R_D16(is), NAM56R_D(is, 2), NAM56R_D(is, 3)
#define NAM56R_D48(is) NAM56R_D32(is), NAM56R_D(is, 4), NAM56R_D(is, 5)
#define NAM56R_D64(is) NAM56R_D48(is), NAM56R_D(is, 6), NAM56R_D(is, 7)
#define NAM56R_D72(is) NAM56R_D64(is), NAM56R_D(is, 8)
#define NAM56R_D128(is) \
  NAM56R_D64(is), NAM56R_D(is, 8), NAM56R_D(is, 9), NAM56R_D(is, 10), NAM56R_D(is, 11), NAM56R_D(is, 12), NAM56R_D(is, 13), \
      NAM56R_D(is, 14), NAM56R_D(is, 15)
#define NAM56R_D192(is) \
  NAM56R_D128(is), NAM56R_D(is, 16), NAM56R_D(is, 17), NAM56R_D(is, 18), NAM56R_D(is, 19), NAM56R_D(is, 20), NAM56R_D(is, 21), \
      NAM56R_D(is, 22), NAM56R_D(is, 23)
#define NAM56R_OLD(x) "+f"(x)
#define NAM56R_NEW(x) "=&f"(x)  // what is not read isn't kept for it

// l0 ... are the numbers of the asm's operands past d's: descriptors, a's registers, b_is, add.
#define NAM56R_PRODUCT(T, type, n, list, l0, l1, l2, l3, l4, l5, l6) \
  template <> struct Product<T, n> { \
    template <int b_is, int add = 1, int a_is = kAcross> \
    __device__ static void shared(float (&d)[n / 8][4], unsigned long long a, unsigned long long b) { \
      if constexpr (add) \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
                     " {" list "}, " l0 ", " l1 ", 1, 1, 1, " l3 ", " l2 ";" \
                     : NAM56R_D##n(NAM56R_OLD) : "l"(a), "l"(b), "n"(b_is), "n"(a_is)); \
      else \
        asm volatile("{.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
                     " {" list "}, " l0 ", " l1 ", p, 1, 1, " l3 ", " l2 ";\n}" \
                     : NAM56R_D##n(NAM56R_NEW) : "l"(a), "l"(b), "n"(b_is), "n"(a_is)); \
    } \
    template <int b_is> \
    __device__ static void held(float (&d)[n / 8][4], const unsigned (&a)[4], unsigned long long b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
                   " {" list "}, {" l0 ", " l1 ", " l2 ", " l3 "}, " l4 ", 1, 1, 1, " l5 ";" \
                   : NAM56R_D##n(NAM56R_OLD) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(b_is)); \
    } \
    template <int b_is> \
    __device__ static void held_first(float (&d)[n / 8][4], const unsigned (&a)[4], unsigned long long b) { \
      asm volatile("{.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
                   " {" list "}, {" l0 ", " l1 ", " l2 ", " l3 "}, " l4 ", p, 1, 1, " l5 ";\n}" \
                   : NAM56R_D##n(NAM56R_NEW) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(b_is)); \
    } \
  };
#define NAM56R_LIST8 \
  "%0, %1, %2, %3"
#define NAM56R_LIST16 NAM56R_LIST8 \
  ", %4, %5, %6, %7"
#define NAM56R_LIST32 NAM56R_LIST16 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAM56R_LIST48 NAM56R_LIST32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAM56R_LIST64 NAM56R_LIST48 \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAM56R_LIST72 NAM56R_LIST64 \
  ", %32, %33, %34, %35"
#define NAM56R_LIST128 NAM56R_LIST64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAM56R_LIST192 NAM56R_LIST128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAM56R_PRODUCTS(T, type) \
  NAM56R_PRODUCT(T, type, 8, NAM56R_LIST8, "%4", "%5", "%6", "%7", "%8", "%9", "%10") \
  NAM56R_PRODUCT(T, type, 16, NAM56R_LIST16, "%8", "%9", "%10", "%11", "%12", "%13", "%14") \
  NAM56R_PRODUCT(T, type, 32, NAM56R_LIST32, "%16", "%17", "%18", "%19", "%20", "%21", "%22") \
  NAM56R_PRODUCT(T, type, 48, NAM56R_LIST48, "%24", "%25", "%26", "%27", "%28", "%29", "%30") \
  NAM56R_PRODUCT(T, type, 64, NAM56R_LIST64, "%32", "%33", "%34", "%35", "%36", "%37", "%38") \
  NAM56R_PRODUCT(T, type, 72, NAM56R_LIST72, "%36", "%37", "%38", "%39", "%40", "%41", "%42") \
  NAM56R_PRODUCT(T, type, 128, NAM56R_LIST128, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  NAM56R_PRODUCT(T, type, 192, NAM56R_LIST192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
NAM56R_PRODUCTS(BFloat16, "bf16")
NAM56R_PRODUCTS(Float16, "f16")

// Of 8-bit elements, two where one of 16 bits would be; the sum is over 32.
template <> struct Product<E4M3, 128> {
  template <int b_is>
  __device__ static void held(float (&d)[16][4], const unsigned (&a)[4], unsigned long long b) {
    static_assert(b_is == kAcross);
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAM56R_LIST128 "}, {%64, %65, %66, %67}, %68, 1, 1, 1;"
                 : NAM56R_D128(NAM56R_OLD) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
  template <int b_is>
  __device__ static void held_first(float (&d)[16][4], const unsigned (&a)[4], unsigned long long b) {
    static_assert(b_is == kAcross);
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAM56R_LIST128
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
                 : NAM56R_D128(NAM56R_NEW) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

// d = a b^T, 64 rows of a; between start and finish: the k-th 16 columns of both tiles, or all `columns`.
template <typename T, int eights, class A, class B>
__device__ __forceinline__ void product_across(float (&d)[eights][4], const A& a, const B& b, int k) {
  using Of = Product<T, 8 * eights>;
  k ? Of::template shared<kAcross>(d, a.descriptor(0, k * 16), b.descriptor(0, k * 16))
    : Of::template shared<kAcross, 0>(d, a.descriptor(0, 0), b.descriptor(0, 0));
}
template <typename T, int columns, int eights, class A, class B>
__device__ __forceinline__ void across(float (&d)[eights][4], const A& a, const B& b) {
#pragma unroll
  for (int k = 0; k < columns / 16; ++k) product_across<T>(d, a, b, k);
}

}  // namespace nam56r
