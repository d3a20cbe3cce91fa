// What a product of two quantized tensors is made of, for its checks (linear.cpp) and its kernels (linear.inc).
#pragma once

#include <array>
#include <initializer_list>

#include "../row.h"
#include "integers.h"
#include "threads.h"

namespace fused_ops {

constexpr int64_t kBlock = 512;    // columns summed before they are folded, where no scales are grouped
constexpr int64_t kTile = kLanes;  // weight rows that are worked on together
constexpr int64_t kMaxRows = 256;  // rows of x in one pass over the weight

constexpr float kOne = 1;
constexpr int64_t kInferred = -1;  // instead of the key of a weight

// How codes become the values that are multiplied; see linear_formats.inc.
enum class Decoder { kInt8, kFloatInt8, kE4m3, kE4m3Fnuz, kMxE4m3, kMxE4m3Fnuz, kMxE2m1, kNvE2m1 };

// One of the two that are multiplied.
struct Operand {
  Rows codes;
  int64_t rows = 0, cols = 0;  // cols: K
  Key key{0};
  Decoder decoder = Decoder::kInt8;
  ScaleOut groups;                    // scales that belong to the values,
  const float* group_values = &kOne;  // and what their codes mean
};

// Factors of rows and of blocks of columns; without any, they are 1.
struct Factors {
  const float* data = &kOne;
  int64_t row_stride = 0, block_stride = 0;

  double operator()(int64_t row, int64_t block = 0) const { return data[row * row_stride + block * block_stride]; }
};

// The scale, or zero point, of a row and a group.
template <class T>
T scale_at(const ScaleOut& scale, int64_t row, int64_t group) {
  return *reinterpret_cast<const T*>(scale.data + scale.row(row) + group / 4 * scale.four + group % 4 * scale.one);
}

struct Linear {
  Operand x, w;
  Rows y;                              // [T, N]
  Integers source;                     // which row of x a row of y is made of; absent: the same
  int64_t block = kBlock, blocks = 0;  // columns that are folded together, and how many of those make a row

  ScaleOut x_scale, zero_point;  // as they were given, either may be absent
  int64_t x_group = 0;           // columns that share one of x_scale, 0: all
  Factors x_row, x_block;        // for the rows of this pass
  Factors w_row;
  const float* w_block = &kOne;  // 2^w_row_shift rows and 2^w_shift blocks of columns share one
  int64_t w_stride = 0;
  int w_row_shift = 0, w_shift = 62;

  const void* bias = nullptr;  // [N], may be absent
  ScalarType bias_dtype = ScalarType::Float, dtype = ScalarType::Float;

  int64_t first = 0, rows = 0;  // rows of y that share this weight; in a pass, those in it
  void* decoded = nullptr;      // [blocks, rows, block], of their rows of x
  bool extreme = false;         // has scales that bfloat16 is too small for

  // The row of x that row m of this pass is made of.
  int64_t row_of_x(int64_t m) const { return source ? source[first + m] : first + m; }
  // The zero point of block b of it.
  int zero(int64_t m, int64_t b) const {
    return zero_point ? scale_at<int32_t>(zero_point, row_of_x(m), x_group ? b * block / x_group : 0) : 0;
  }
  // Factors of weight row n: of block b at b >> w_shift.
  const float* w_blocks(int64_t n) const { return w_block + (n >> w_row_shift) * w_stride; }
  // Columns of block b.
  int64_t block_cols(int64_t b) const { return std::min(block, x.cols - b * block); }
};

extern const std::array<float, 256> kE8m0Values;  // what each code means

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A product from its arguments, of all rows and without y; throws before anything is written.
Linear linear_of(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight, const Tensor& weight_scale,
                 const OptionalTensor& bias, ScalarType dtype, const OptionalTensor& scale2 = {},
                 const OptionalTensor& zero_point = {}, int64_t weight_key = kInferred,
                 const OptionalTensor& weight_scale2 = {});

// Throws where p.y lies over itself or over one of the arguments, which may be absent.
void check_result(const Linear& p, std::initializer_list<const OptionalTensor*> arguments);

// The products of `count` groups of rows, each with a weight of its own and else alike.
void run(Linear* groups, int64_t count);

}  // namespace fused_ops
