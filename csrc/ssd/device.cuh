// Device code that the kernels of the scan share: element types, tensor-core products, copies into shared memory.
//
// These headers include nothing but each other: NVRTC compiles them at run time for what isn't built ahead.
#pragma once

namespace nam56r::ssd {

struct BFloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

template <typename T> struct Pair;  // two elements in a register, the first in the low half

template <> struct Pair<Float16> {
  __device__ static unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  __device__ static float2 unpack(unsigned pair) {
    float2 x;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
  }
  __device__ static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <> struct Pair<BFloat16> {
  __device__ static unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  __device__ static float2 unpack(unsigned pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  __device__ static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ inline void ldsm(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline void ldsm_t(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Copies 16 bytes, or zeros where !inside.
__device__ inline void copy16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ inline void copy4(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(shared_address(to)), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A tile of 16-bit elements in shared memory, rows padded by 16 bytes: eight rows' 16 bytes lie in different banks.
// ldmatrix addresses of 16 x 16 elements at (row, column), as an operand of mma.m16n8k16:
//   a:     A[m][k] from rows m            b:   B[k][n] of two blocks n from rows n (k along a row)
//   a_t:   A[m][k] from rows k            b_t: the same from rows k
// A warp's lane 4 g + t holds of an accumulator [16][8] the columns 2 t, 2 t + 1 of the rows g (0, 1) and g + 8 (2, 3).
template <int ROWS, int COLUMNS>
struct Tile {
  static constexpr int kStride = COLUMNS + 8;
  unsigned short x[ROWS][kStride];

  __device__ unsigned rows_first(int row, int column) const {  // a, b_t
    const int lane = threadIdx.x % 32;
    return shared_address(&x[row + lane % 16][column + lane / 16 * 8]);
  }
  __device__ unsigned columns_first(int row, int column) const {  // b, a_t
    const int lane = threadIdx.x % 32;
    return shared_address(&x[row + lane % 8 + lane / 16 * 8][column + lane / 8 % 2 * 8]);
  }
  __device__ void a(unsigned (&r)[4], int row, int column) const { ldsm(r, rows_first(row, column)); }
  __device__ void b(unsigned (&r)[4], int n, int k) const { ldsm(r, columns_first(n, k)); }
  __device__ void a_t(unsigned (&r)[4], int k, int m) const { ldsm_t(r, columns_first(k, m)); }
  __device__ void b_t(unsigned (&r)[4], int k, int n) const { ldsm_t(r, rows_first(k, n)); }
  __device__ unsigned pair(int row, int column) const { return *reinterpret_cast<const unsigned*>(&x[row][column]); }
  __device__ void put(int row, int column, unsigned p) { *reinterpret_cast<unsigned*>(&x[row][column]) = p; }
};

// e^x and 1 / (1 + e^-x) to about 2^-22 of themselves; results below 2^-126 are 0.
__device__ inline float exp_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sigmoid(float x) { return reciprocal(1.f + exp_(-x)); }

}  // namespace nam56r::ssd
