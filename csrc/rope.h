// Rotary embedding and caches: what a token's heads of q, k and v go through, for every device.
//
//   norm -> rotate -> write: the result, its codes, a row of a paged cache
//
// An operation's overloads (rope.cpp) check their arguments and fill in a Rope; each part that is absent is left out.
#pragma once

#include "row.h"

namespace fused_ops {

// Where the heads of tokens lie.
struct Place {
  char* data = nullptr;
  int64_t token = 0, head = 0;  // strides in bytes

  explicit operator bool() const { return data != nullptr; }

  template <class T>
  T* at(int64_t t, int64_t h) const {
    return reinterpret_cast<T*>(data + t * token + h * head);
  }
};

// Where they lie in a paged cache.
struct CachePlace {
  char* data = nullptr;
  int64_t block = 0, slot = 0, head = 0;  // strides in bytes
  bool coded = false;                     // it holds codes, of a static key, and not S
  Key key{0};
  const float* scale = nullptr;
  bool scale_per_head = false;

  explicit operator bool() const { return data != nullptr; }
};

// q, k or v: `count` heads of `cols` elements for each token.
struct Heads {
  Place in, out;  // out may be absent
  CachePlace cache;
  int64_t count = 0, cols = 0;
  Norm norm;  // may be absent
  bool rotated = false;
};

struct Rope {
  static constexpr int kIsNeox = 4, kRoundProducts = 8, kWholeVector = 16, kNormV = 32;  // flags, besides a norm's

  int device = kCpu;
  int64_t tokens = 0;
  ScalarType dtype = ScalarType::Float;  // S
  Heads q, k, v;                         // v may be absent
  bool whole_vector = false;             // a norm is of all heads of a token, whose weight is as long

  Place table;  // cosines, then sines: `half` float32 each
  int64_t table_rows = 0, half = 0;
  bool is_neox = false, round_products = false;
  const void* positions = nullptr;  // absent: row t of the table is token t's
  bool long_positions = false;
  int64_t axis_stride = 0;  // of positions, in elements
  int64_t mrope = 0;        // which axis each pair turns by: as in fused_ops/rope.py

  const void* slots = nullptr;  // absent: there is no cache
  bool long_slots = false;
  int64_t slot_count = 0, block_size = 1, slots_in_cache = 0;

  Pipeline codes;  // of q's heads, as rows; absent without data
  Place gate, gate_out;
  int64_t gate_cols = 0;

  bool stream = false;  // on the CPU: results in S go around the caches

  int64_t position(int64_t t, int axis = 0) const {
    if (!positions) return t;
    const int64_t i = axis * axis_stride + t;
    return long_positions ? static_cast<const int64_t*>(positions)[i] : static_cast<const int32_t*>(positions)[i];
  }
  // -1: not to be written.
  int64_t slot(int64_t t) const {
    if (t >= slot_count) return -1;
    return long_slots ? static_cast<const int64_t*>(slots)[t] : static_cast<const int32_t*>(slots)[t];
  }
  // Which position pair i turns by.
  int axis(int64_t i) const {
    const int64_t time = mrope & 1023, height = mrope >> 10 & 1023, width = mrope >> 20 & 1023;
    if (mrope >> 30) return i % 3 == 1 && i < 3 * height ? 1 : i % 3 == 2 && i < 3 * width ? 2 : 0;
    return i < time ? 0 : i < time + height ? 1 : 2;
  }
};

// On torch's threads, and on a CUDA device.
void run_on_cpu(Rope& p);
void run_on_cuda(Rope& p);

}  // namespace fused_ops
