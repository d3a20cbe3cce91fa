// Stand-in.
#pragma once
#include "row.h"
namespace fused_ops {
struct Collective {
  const Tensor* workspace;
  int64_t rank;
  bool scattered;
  int64_t rows;  // of all ranks
};
void run_on_cuda(Pipeline& p, const Collective& c);
}
