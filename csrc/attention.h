// Attention over a paged cache: what its operations (attention.cpp) hand to the kernels.
//
//   for each query row: blocks of keys -> (largest logit, weights' sum, mean value) -> merged in order -> y, its codes
//
// A block's part of a row follows from the row and the keys that it sees there, and blocks begin at fixed places of a
// sequence. So a row's bits are the same in any batch, in prefill, its chunks and decoding, with any number of threads.
// (Mla::absorbs asks for the number of queries; so MLA's bits follow from that too.)
#pragma once

#include <vector>

#include "rope.h"

namespace fused_ops {

// Integers of either width.
struct Numbers {
  const void* data = nullptr;
  bool wide = false;

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Rows of a cache: of token `slot` of a block, for one head.
struct Cached {
  const char* data = nullptr;
  int64_t block = 0, slot = 0, head = 0;  // strides in bytes
  int64_t cols = 0;
  ScalarType dtype = ScalarType::Float;
  const float* scale = nullptr;  // of codes
  int64_t scale_stride = 0;      // from one head's to the next
};

// The last `queries` of `length` tokens; their rows of q begin at `row`.
struct Sequence {
  int64_t index, row, queries, length;
};

struct Attention {
  int64_t heads = 0, kv_heads = 0;
  Place q;
  ScalarType q_dtype = ScalarType::Float;
  Cached k, v;  // k.cols: of q too

  std::vector<Sequence> sequences;  // those that have queries
  Numbers tables;
  int64_t table_stride = 0, block_size = 1;

  float scale = 1, cap = 0;  // cap: 0 where there is none
  bool causal = true;
  int64_t window = 0;           // 0: none
  const void* sinks = nullptr;  // may be absent
  ScalarType sinks_dtype = ScalarType::Float;

  Place results;        // float32, for a kernel that follows; absent where y and codes are made
  Pipeline out;         // y and codes of all heads of a token, side by side
  bool slices = false;  // codes are made a head at a time, otherwise of y's whole rows
  int64_t used = 0;     // rows behind are zeros

  // Keys [first, second) that query t of a sequence sees.
  std::pair<int64_t, int64_t> seen(const Sequence& s, int64_t t) const {
    const int64_t place = s.length - s.queries + t;
    return {window ? std::max<int64_t>(0, place + 1 - window) : 0, causal ? place + 1 : s.length};
  }
};

// A projection's rows, of each head.
struct Weight {
  const char* data = nullptr;
  int64_t head = 0, row = 0;  // strides in bytes
  int64_t rows = 0;           // of a head
};

// Of latents: queries are q's first columns, projected to the latent's, and q_pe.
struct Mla {
  Attention attention;  // k: whole rows of the cache, v: the latents; sequences: all
  Place q_nope, q_pe;
  Weight w_uk, w_uv;
  int64_t rank = 0, rope = 0;

  // `absorbs` of fused_ops/mla.py.
  bool absorbs(const Sequence& s) const {
    const double pairs = static_cast<double>(s.queries) * static_cast<double>(s.length);
    const double product = static_cast<double>((w_uk.rows + w_uv.rows) * rank);
    return static_cast<double>(s.queries) * product + pairs * static_cast<double>(2 * rank + rope) <=
           static_cast<double>(s.length) * product + pairs * static_cast<double>(w_uk.rows + rope + w_uv.rows);
  }
};

// On torch's threads.
void run_on_cpu(Attention& p);
void run_on_cpu(Mla& p);

}  // namespace fused_ops
