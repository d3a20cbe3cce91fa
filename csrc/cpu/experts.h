// What the sum over a token's experts is made of, for its checks (experts.cpp) and its kernel (experts.inc).
#pragma once

#include "../row.h"
#include "integers.h"
#include "threads.h"

namespace fused_ops {

struct ExpertsSum {
  Rows y, weights, out;      // [R, N], [T, k], [T, N]
  ScalarType dtype, weight;  // of y and the result, and of the weights
  Integers positions;        // [T, k]
};

}  // namespace fused_ops
