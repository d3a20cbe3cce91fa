// Rotary embedding of q and k: what rope.cpp fills in and rope.inc runs.
#pragma once

#include "threads.h"

namespace fused_ops {

struct Rope {
  struct Heads {
    Rows in, out;  // a row is one head of one token
    int64_t per_token;
  } q, k;
  int64_t head_dim, half;  // half of the rotated width
  ScalarType dtype;
  const float* cos_sin;  // [rows, 2 * half]
  int64_t cos_sin_stride;
  const void* positions;  // absent: row t belongs to token t
  bool wide_positions;    // int64, else int32
  bool is_neox, round_products;

  int64_t position(int64_t t) const {
    if (!positions) return t;
    return wide_positions ? static_cast<const int64_t*>(positions)[t] : static_cast<const int32_t*>(positions)[t];
  }
};

}  // namespace fused_ops
