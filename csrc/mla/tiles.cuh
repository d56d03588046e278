// What the kernels of attention share: shapes, stages of keys, the order of the work, scores.
#pragma once

#include "hopper/groups.cuh"
#include "hopper/wgmma.cuh"
#include "mla/arguments.cuh"

namespace nam56r::mla {

template <int NOPE_, int ROPE_, int VALUE_, bool SHARED_>
struct Shape {
  static constexpr int NOPE = NOPE_, ROPE = ROPE_, KEY = NOPE + ROPE, VALUE = VALUE_;
  static constexpr bool SHARED = SHARED_;  // the value is the nope part of the key
};

// A block of keys and their values, which are a part of them or a tile of their own.
template <class Sh, int KEYS>
struct KeyTiles {
  Tile<KEYS, Sh::NOPE> nope;
  Tile<KEYS, Sh::ROPE> rope;
  __device__ unsigned long long key(int row, int column) const {
    return column < Sh::NOPE ? nope.descriptor(row, column) : rope.descriptor(row, column - Sh::NOPE);
  }
};
template <class Sh, int KEYS, bool SHARED = Sh::SHARED>
struct Stage : KeyTiles<Sh, KEYS> {
  __device__ const auto& value() const { return this->nope; }
};
template <class Sh, int KEYS>
struct Stage<Sh, KEYS, false> : KeyTiles<Sh, KEYS> {
  Tile<KEYS, Sh::VALUE> v;
  __device__ const auto& value() const { return v; }
};

// How the kernels are cut to a shape: warpgroups that multiply, keys or rows of a stage, stages; tiles of q.
template <int GROUPS_, int KEYS_, int STAGES_, int QUEUE_>
struct Forward {
  static constexpr int GROUPS = GROUPS_, KEYS = KEYS_, STAGES = STAGES_, QUEUE = QUEUE_;
};
template <int GROUPS_, int KEYS_, int STAGES_>
struct Queries {
  static constexpr int GROUPS = GROUPS_, KEYS = KEYS_, STAGES = STAGES_;
  static constexpr bool ROOM = GROUPS == 2;  // for dout in registers, and for dP beside the sums' operand
};
template <int GROUPS_, int ROWS_, int STAGES_, bool HELD_, bool SUMS_FIRST_>
struct Keys {
  static constexpr int GROUPS = GROUPS_, ROWS = ROWS_, STAGES = STAGES_;
  static constexpr bool HELD = HELD_;              // the keys lie in registers
  static constexpr bool SUMS_FIRST = SUMS_FIRST_;  // sums settle, and the next scores take the place of their operands
};
template <class Sh> struct By;
template <> struct By<Shape<64, 64, 64, true>> {
  using forward = Forward<3, 128, 4, 2>;
  using queries = Queries<3, 64, 4>;
  using keys = Keys<2, 64, 4, true, false>;
};
template <> struct By<Shape<64, 64, 64, false>> {
  using forward = Forward<3, 128, 3, 1>;
  using queries = Queries<3, 64, 4>;
  using keys = Keys<2, 64, 4, false, false>;
};
template <> struct By<Shape<128, 64, 128, false>> {
  using forward = Forward<3, 64, 3, 1>;
  using queries = Queries<2, 64, 3>;
  using keys = Keys<2, 48, 4, false, true>;
};
template <class Sh> using ForwardBy = typename By<Sh>::forward;
template <class Sh> using QueriesBy = typename By<Sh>::queries;
template <class Sh> using KeysBy = typename By<Sh>::keys;

// Registers a thread of what multiplies and of what fetches.
template <int GROUPS> constexpr int kMultiplying = GROUPS == 2 ? 240 : 160;
template <int GROUPS> constexpr int kFetching = GROUPS == 2 ? 24 : 32;
// The pieces of work: `each` of every head of every batch, the long ones first; `together` heads at a time, whose keys the L2
// cache can hold. Blocks take the next one when they are ready for it, which says nothing of the results: a piece's are its own.
struct Pieces {
  int each, heads, together;
  int* taken;

  __device__ Pieces(const Arguments& a, int each, int* taken) : each(each), heads(a.apart * a.batch), together(a.together), taken(taken) {}
  // By the thread that fetches: -1 when there is none left.
  __device__ int next() const {
    const int piece = atomicAdd(taken, 1);
    return piece < each * heads ? piece : -1;
  }
  // Which of its head's pieces, and whose.
  struct Piece {
    int number, head;
  };
  __device__ Piece piece(int at) const {
    const int first = at / (each * together) * together, count = min(together, heads - first), rest = at - each * first;
    return {rest / count, first + rest % count};
  }
};

// Tiles of rows as pieces, the last rows, which see most, first; and the keys that any of a tile's rows sees.
template <int ROWS>
struct RowTiles {
  const Arguments& a;
  int rows, tiles;
  Pieces pieces;

  __device__ explicit RowTiles(const Arguments& a)
      : a(a), rows(a.queries * a.packed), tiles((rows + ROWS - 1) / ROWS), pieces(a, tiles, a.taken) {}
  struct Place {
    int row, head, batch;
  };
  __device__ Place place(int piece) const {
    const auto of = pieces.piece(piece);
    return {(tiles - 1 - of.number) * ROWS, of.head % a.apart, of.head / a.apart};
  }
  // Of a row's results among all, [B, S, H]: tokens, packed heads, heads apart, of which packed or apart are one.
  __device__ long long index(const Place& place, int row) const { return ((long long)place.batch * rows + row) * a.apart + place.head; }
  __device__ int token(int row) const { return min(row, rows - 1) / a.packed; }
  __device__ Seen range(int row) const { return {seen_by(a, token(row)).first, seen_by(a, token(row + ROWS - 1)).end}; }
  // How many blocks of a tile's keys any of the 64 rows from one on sees.
  __device__ int blocks(const Seen& keys, int row, int size) const {
    return max(0, (min(keys.end, seen_by(a, token(row + 63)).end) - keys.first + size - 1) / size);
  }
  // What all of the 64 rows from one on see.
  __device__ Seen by_all(int row) const { return {seen_by(a, token(row + 63)).first, seen_by(a, token(row)).end}; }
};

template <int COLUMNS, class TileT>
__device__ inline void fetch(Arrival& here, TileT& tile, const TensorMap& map, int row, int head, int batch) {
#pragma unroll
  for (int part = 0; part < COLUMNS / 64; ++part) here.copy_rows(&tile.x[part][0][0], &map, part * 64, row, head, batch);
}

template <class Sh, int KEYS>
__device__ inline void fetch_keys(Arrival& here, Stage<Sh, KEYS>& stage, const Maps& maps, int key, int head, int batch) {
  here.expect(sizeof(stage));
  fetch<Sh::NOPE>(here, stage.nope, maps.nope, key, head, batch);
  fetch<Sh::ROPE>(here, stage.rope, maps.rope, key, 0, batch);
  if constexpr (!Sh::SHARED) fetch<Sh::VALUE>(here, stage.v, maps.v, key, head, batch);
}

// Which of the stages of keys are filled, by one thread, and emptied, by GROUPS groups, each with a count of its own.
template <class Sh, int GROUPS, int KEYS, int STAGES>
struct KeyStages {
  Arrival here[STAGES], free[STAGES];

  __device__ void make() {
    for (int i = 0; i < STAGES; ++i) here[i].make(), free[i].make(GROUPS);
  }
  __device__ static int blocks(const Seen& keys) { return (keys.end - keys.first + KEYS - 1) / KEYS; }
  // The last keys first.
  __device__ void fetch_all(Stage<Sh, KEYS> (&stage)[STAGES], int& fetched, const Maps& maps, const Seen& keys, int head, int batch) {
    for (int j = blocks(keys) - 1; j >= 0; --j, ++fetched) {
      const int i = fetched % STAGES;
      if (fetched >= STAGES) free[i].wait(fetched / STAGES % 2 ^ 1);
      fetch_keys<Sh, KEYS>(here[i], stage[i], maps, keys.first + j * KEYS, head, batch);
    }
  }
  __device__ int next(int& taken) {  // the stage that comes, once it is here
    const int i = taken % STAGES;
    here[i].wait(taken / STAGES % 2), ++taken;
    return i;
  }
};

// d = a b^T over COLUMNS, of which a(c) and b(c) describe the 16 from c on
template <typename T, int COLUMNS, int n, class A, class B>
__device__ __forceinline__ void multiply(float (&d)[n][4], const A& a, const B& b) {
#pragma unroll
  for (int c = 0; c < COLUMNS; c += 16) {
    if (c) Product<T, 8 * n>::template shared<kAcross>(d, a(c), b(c));
    else Product<T, 8 * n>::template shared<kAcross, 0>(d, a(0), b(0));
  }
}
// the same of a in registers
template <typename T, int COLUMNS, int n, int m, class B>
__device__ __forceinline__ void multiply(float (&d)[n][4], const unsigned (&a)[m][4], const B& b) {
  Product<T, 8 * n>::template held_first<kAcross>(d, a[0], b(0));
#pragma unroll
  for (int c = 16; c < COLUMNS; c += 16) Product<T, 8 * n>::template held<kAcross>(d, a[c / 16], b(c));
}
// scores [64, KEYS]: rows of q from one on, times keys
template <typename T, class Sh, int n, class Q, class StageT>
__device__ __forceinline__ void scores_of(float (&s)[n][4], const Q& q, int row, const StageT& stage) {
  multiply<T, Sh::KEY>(s, [&](int c) { return q.descriptor(row, c); }, [&](int c) { return stage.key(0, c); });
}

// held: fp32 results [64, 8 n] in 16 bits, as an A operand
template <typename T, int n>
__device__ __forceinline__ void pack(unsigned (&held)[n / 2][4], const float (&x)[n][4]) {
#pragma unroll
  for (int c = 0; c < n / 2; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* from = &x[2 * c + e / 2][e % 2 * 2];
      held[c][e] = Pair<T>::pack(from[0], from[1]);
    }
}

// d [64, COLUMNS] += held [64, DEPTH] tile [DEPTH, COLUMNS], into d's columns from `column` on
template <typename T, int COLUMNS, int DEPTH, int n, class TileT>
__device__ __forceinline__ void add_rows(float (&d)[n][4], const unsigned (&held)[DEPTH / 16][4], const TileT& tile, int column = 0) {
#pragma unroll
  for (int c = 0; c < DEPTH / 16; ++c)
    Product<T, COLUMNS>::template held<kAlong>(reinterpret_cast<float(&)[COLUMNS / 8][4]>(d[column / 8]), held[c], tile.descriptor(c * 16, 0));
}

// A group's rows of a result [64, COLUMNS], if wanted, leave through its rows of a tile, which are free again afterwards.
template <typename T, int COLUMNS, int n, class TileT>
__device__ __forceinline__ void store_group(TileT& tile, const float (&x)[n][4], const TensorMap& map, int group, int row, int head, int batch, bool wanted = true) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; ++i) {
    unsigned o[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* from = &x[2 * i + e / 2][e % 2 * 2];
      o[e] = Pair<T>::pack(from[0], from[1]);
    }
    tile.put_rows(o, group * 64 + warp_row(), i * 16);
  }
  publish();
  wait_at(kGroup + group, 128);
  if (wanted && threadIdx.x % 128 == 0) {
#pragma unroll
    for (int part = 0; part < COLUMNS / 64; ++part) store_rows(&map, &tile.x[part][group * 64][0], part * 64, row + group * 64, head, batch);
    wait_stores();
  }
}

}  // namespace nam56r::mla
