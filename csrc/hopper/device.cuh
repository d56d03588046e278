// Device code for Hopper that several families share: element types, barriers, copies into shared memory, tiles as wgmma has them.
//
// These headers include nothing but each other: NVRTC compiles them at run time for what isn't built ahead.
#pragma once

// Kernels are empty in code for other architectures, which a build may hold too (NAM56R_CUDA_ARCHS), and are never called there.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NAM56R_HOPPER 1
#else
#define NAM56R_HOPPER 0
#endif

namespace nam56r {

struct BFloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };
struct E4M3 { unsigned char bits; };

template <bool kIs> struct Bool {
  __device__ constexpr operator bool() const { return kIs; }
};

template <int kValue> struct Int {
  __device__ constexpr operator int() const { return kValue; }
};

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
  __device__ static unsigned add(unsigned x, unsigned y) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
    return sum;
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
  __device__ static unsigned add(unsigned x, unsigned y) {
    unsigned sum;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
    return sum;
  }
};

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Copies 16 bytes, or zeros where !inside.
__device__ inline void copy16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ inline void copy4(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(shared_address(to)), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewer = 0>  // all but the groups committed last
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(kNewer) : "memory"); }

// Barriers by number, of `threads` that wait or have only arrived.
__device__ inline void wait_at(int number, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}
__device__ inline void arrive_at(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(threads) : "memory");
}
// Waits, and says whether any of them does.
__device__ inline bool any_at(int number, int threads, bool mine) {
  int any;
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred p, %2, %3, p;\nselp.b32 %0, 1, 0, p;\n}"
      : "=r"(any) : "r"(int(mine)), "r"(number), "r"(threads) : "memory");
  return any;
}
// Registers move from one warpgroup to another.
template <int kRegisters>
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kRegisters)); }
template <int kRegisters>
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kRegisters)); }

// A kernel launched early starts when all blocks of the one before it have called release_next or ended. It ends for both, so
// some thread must call wait_for_previous, which returns when that one has ended.
__device__ inline void release_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// How a tensor lies in memory, for copies of whole tiles of it (a CUtensorMap).
struct alignas(64) TensorMap {
  unsigned long long x[16];
};

// A barrier in shared memory that counts arrivals of threads and bytes of copies.
struct Arrival {
  unsigned long long x;

  __device__ void make(int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(&x)), "r"(arrivals) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(&x)) : "memory"); }
  __device__ void arrive_when_copied() {  // when what the thread has started with copy16 or copy4 is there
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(&x)) : "memory");
  }
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(&x)), "r"(bytes) : "memory");
  }
  __device__ void copy(void* to, const void* from, int bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&x)) : "memory");
  }
  // A box of a tensor [batch, rank, token, group, column], swizzled as a Tile is.
  __device__ void copy_box(void* to, const void* map, int column, int group, int token, int batch) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
        :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(group), "r"(token), "r"(0), "r"(batch), "r"(shared_address(&x)) : "memory");
  }
  // The same of a tensor of four dimensions, the first of them the columns.
  __device__ void copy_rows(void* to, const void* map, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
        :: "r"(shared_address(to)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(&x)) : "memory");
  }
  __device__ void wait(int parity) {
    asm volatile("{.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
        :: "r"(shared_address(&x)), "r"(parity) : "memory");
  }
};
// A box of a tensor of four dimensions, written from a Tile; what lies outside of it isn't. Then, by the thread that did so:
// its boxes' places in shared memory can be written again.
__device__ inline void store_rows(const void* map, const void* from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
      :: "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(from)) : "memory");
}
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// A tile of 16-bit elements in shared memory, 64 columns after 64 columns, as wgmma reads it with its 128-byte swizzle:
// the eight 16-byte units of a row of 64 lie in the order unit ^ row % 8, so that 8 rows' units lie in different banks.
// A warp's lane 4 g + t holds of an accumulator [16][8] the columns 2 t, 2 t + 1 of the rows g (0, 1) and g + 8 (2, 3).
template <int ROWS, int COLUMNS>
struct alignas(1024) Tile {
  static constexpr int kParts = (COLUMNS + 63) / 64;
  unsigned short x[kParts][ROWS][64];

  __device__ unsigned short* unit(int row, int column) {  // the 16 bytes that hold the column
    return &x[column / 64][row][(column % 64 / 8 ^ row % 8) * 8];
  }
  __device__ const unsigned short* unit(int row, int column) const { return const_cast<Tile*>(this)->unit(row, column); }
  __device__ unsigned pair(int row, int column) const {
    return *reinterpret_cast<const unsigned*>(unit(row, column) + column % 8);
  }
  __device__ void put(int row, int column, unsigned p) { *reinterpret_cast<unsigned*>(unit(row, column) + column % 8) = p; }

  // 16 x 16 from (row, column), transposed: register e has the rows 2 t, 2 t + 1 (+ 8 where e is odd) of the column g
  // (+ 8 where e > 1). A tile of eight rows has them twice.
  __device__ void columns(unsigned (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(unit(row + lane % (ROWS < 16 ? 8 : 16), column + lane / 16 * 8))) : "memory");
  }
  // The same in the order of a product's A operand: the second has the column g + 8, the third the rows + 8.
  __device__ void operand_columns(unsigned (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(unit(row + lane % 8 + (ROWS < 16 ? 0 : lane / 16 * 8), column + lane / 8 % 2 * 8))) : "memory");
  }
  // 16 x 16 from (row, column) in the order of a product's A operand.
  __device__ void operand(unsigned (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(unit(row + lane % 16, column + lane / 16 * 8))) : "memory");
  }
  __device__ void put_columns(const unsigned (&r)[4], int row, int column) {
    const int lane = threadIdx.x % 32;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
        :: "r"(shared_address(unit(row + lane % (ROWS < 16 ? 8 : 16), column + lane / 16 * 8))), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
  }
  // 16 x 16 from accumulators of two neighbours [16][8]: registers of the rows g, g + 8 of the one, then of the other.
  __device__ void put_rows(const unsigned (&r)[4], int row, int column) {
    const int lane = threadIdx.x % 32;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
        :: "r"(shared_address(unit(row + lane % 16, column + lane / 16 * 8))), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
  }
  // For wgmma, from a row that is a multiple of 8 and a column that is one of 16.
  __device__ unsigned long long descriptor(int row, int column) const {
    const unsigned on = (column / 64 * ROWS + row) * 8 + column % 64 / 8;
    return (1ull << 62) + (64ull << 32) + (ROWS * 8ull << 16) + (shared_address(x) >> 4) + on;
  }
  // For b_is kAlong, from a column that is a multiple of 64: past 64 columns come those of `next`, a tile behind this, from its row 0.
  template <class TileT>
  __device__ unsigned long long descriptor(int row, int column, const TileT& next) const {
    const unsigned from = (shared_address(x) >> 4) + (column / 64 * ROWS + row) * 8, on = (shared_address(next.x) >> 4) - from;
    return (1ull << 62) + (64ull << 32) + ((unsigned long long)on << 16) + from;
  }
};

// 2^x, e^x and 1 / x to about 2^-22 of themselves; results below 2^-126 are 0.
__device__ inline float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float infinity() { return __int_as_float(0x7f800000); }
constexpr float LOG2_E = 1.4426950408889634f;
__device__ inline float exp_(float x) { return exp2_(x * LOG2_E); }
__device__ inline float reciprocal(float x) {
  float y;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: where a gate is asked for, no branch around it
  return y;
}

}  // namespace nam56r
