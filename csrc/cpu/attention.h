// Pieces of attention, and where a thread works on them.
#pragma once

#include "../attention.h"
#include "isa.h"

namespace fused_ops {

constexpr int kKeys = 256;        // of a block; blocks begin at multiples of this in a sequence
constexpr int kStaged = 32;       // rows that are widened at once
constexpr int kTileRows = 64;     // of a tile, at most
constexpr int kSideBySide = 128;  // rows at most of tiles that are worked on together
constexpr int kDotsAtOnce = 8;    // so many results are written, and vectors pointed to, at once: seven may be surplus

// Query rows that share keys: `tokens` of a sequence, each with `heads` heads of those that read kv_head.
struct Tile {
  const Sequence* sequence;
  int64_t kv_head, token, tokens, head, heads;  // token: in its sequence; head: in the operation
  int64_t first, blocks;                        // of keys that one of them sees
  float* parts = nullptr;                       // of each block, where blocks are spread over threads

  int rows() const { return static_cast<int>(tokens * heads); }
};

// Tiles of the same tokens, for kv_heads that lie side by side in the cache: a block of keys is worked on for one after
// the other, as memory is read best in order.
struct Tiles {
  const Tile* data;
  int64_t count;

  const Tile& operator[](int64_t i) const { return data[i]; }
};

// Matrices of float32 whose rows are padded for whole vectors; see attention_products.inc.
struct Matrix {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const { return data + row * stride; }
};

// Of a block's part of a tile: the rows' mean values, their largest logits and their sums.
inline int64_t part_floats(const Tile& tile, int64_t y_stride) {
  return round_up(tile.rows(), 4) * y_stride + kLanes + round_up(2 * tile.rows(), 16);
}

// A thread's memory.
class Desk {
 public:
  Matrix x, packed, logits, y, part, staged;
  float *most, *sum, *part_most, *part_sum;  // of rows; largest logits, times log2(e)
  int *low, *high;                           // keys of this block that a row sees
  float *row, *slice;                        // of a head that is quantized: as float32, as S
  const char **keys, **values, **next;       // rows of this block, and the first ones of the next
  const char **own, **fetched;               // of one of several tiles: its rows, and what it fetches
  int nexts = 0;

  Desk() = default;

  // For `rows` rows of x with x_cols, whose products with up to `count` vectors are y_cols wide.
  Desk(float* buffer, int64_t rows, int64_t x_cols, int64_t count, int64_t y_cols) {
    rows = round_up(rows, 4);
    const auto take = [&](int64_t floats) {
      float* const taken = buffer + used_;
      used_ += round_up(floats, 16);
      return taken;
    };
    const auto matrix = [&](int64_t height, int64_t cols) {
      const int64_t stride = round_up(cols, 16);
      return Matrix{take(height * stride + kLanes), stride};
    };
    x = matrix(rows, x_cols);
    packed = matrix(rows, round_up(x_cols, 16) / 2);
    logits = matrix(rows, count + kDotsAtOnce);
    y = matrix(rows, y_cols);
    part = matrix(rows, y_cols);
    staged = matrix(kStaged, std::max(x_cols, y_cols));
    for (float** each : {&most, &sum, &part_most, &part_sum}) *each = take(rows);
    low = reinterpret_cast<int*>(take(rows));
    high = reinterpret_cast<int*>(take(rows));
    const int64_t widest = round_up(std::max({x_cols, count, y_cols}), kLanes) + kLanes;
    row = take(widest);
    slice = take(widest);
    keys = reinterpret_cast<const char**>(take(2 * (count + kDotsAtOnce)));
    values = reinterpret_cast<const char**>(take(2 * (count + kDotsAtOnce)));
    next = reinterpret_cast<const char**>(take(2 * kStaged));
    own = reinterpret_cast<const char**>(take(2 * (count + kDotsAtOnce)));
    fetched = reinterpret_cast<const char**>(take(2 * (kStaged + kSideBySide)));
  }

  static int64_t floats(int64_t rows, int64_t x_cols, int64_t count, int64_t y_cols) {
    return Desk(nullptr, rows, x_cols, count, y_cols).used_;
  }

  // The same for rows from `row` on.
  Desk at(int64_t row) const {
    Desk d = *this;
    for (Matrix Desk::* each : {&Desk::x, &Desk::packed, &Desk::logits, &Desk::y, &Desk::part})
      (d.*each).data = (this->*each)[row];
    for (float* Desk::* each : {&Desk::most, &Desk::sum, &Desk::part_most, &Desk::part_sum}) d.*each += row;
    for (int* Desk::* each : {&Desk::low, &Desk::high}) d.*each += row;
    return d;
  }

  // The same with what is made of block b of a tile in its place there.
  Desk with_part(const Tile& tile, int64_t b) const {
    Desk d = *this;
    d.part.data = tile.parts + (b - tile.first) * part_floats(tile, part.stride);
    d.part_most = d.part[round_up(tile.rows(), 4)] + kLanes;
    d.part_sum = d.part_most + tile.rows();
    return d;
  }

 private:
  int64_t used_ = 0;
};

// Where MLA's keys and values of a block are projected to, and the states of all queries of a sequence.
struct Expansion {
  Matrix k, v, y;
  float *most, *sum;
  Desk projection, attention;
};

}  // namespace fused_ops
