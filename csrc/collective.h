// Operations of all ranks of a workspace.
#pragma once

#include <string>

#include "row.h"

namespace fused_ops {

constexpr int kMostRanks = 16;

// What a rank calls: all that must be the same on all of them.
struct Call {
  char name[40] = {};
  int64_t rows = 0, cols = 0, other_cols = 0, dtype = -1, key = -1, flags = -1, weight = -1, other_weight = -1;
  double eps = 0, x_multiplier = 1;
  int64_t attempt = 0;  // which of the rank's calls
};
static_assert(sizeof(Call) == 128, "no padding: calls are compared by their bytes");

std::string text_of(const Call& call);

// What a call says of itself; throws where the tensor isn't a workspace's whole memory, or the rank none of its.
Collective collective_of(const char* name, const Tensor& workspace, int64_t rank, int device);
// What a call of this pipeline is.
Call call_of(const Pipeline& p);
// The rows of `rows` that are a rank's where they are scattered: ceil(rows / ranks) each, the last ones fewer or none.
struct Share {
  int64_t begin, end;
};
Share share_of(int64_t rows, int64_t ranks, int64_t rank);

// Rows of every rank, one after another, and the scales and zero points that belong to them.
struct Gather {
  Rows x, y;       // of bytes
  int scales = 0;  // how many of the next, also where a rank has no rows and so no memory
  ScaleOut scale[2], result[2];
  int64_t groups = 0;   // of a row
  bool padded = false;  // to whole fours of groups, with zeros
};

// The CPU's (cpu/collective.cpp). They run when all ranks have called the same.
void run_collective_on_cpu(Pipeline& p);
void run_pair_on_cpu(Pipeline& q, Pipeline& k);
void run_gather_on_cpu(const Collective& of, const Call& call, const Gather& gather);

// On a CUDA device (cuda_collective.cpp): a call that differs between ranks, or for which one doesn't come, is found
// there, and told of by the next one's collective_of.
Collective collective_on_cuda(const char* name, const Tensor& workspace, int64_t rank);
void run_collective_on_cuda(Pipeline& p);
void run_pair_on_cuda(Pipeline& q, Pipeline& k);
void run_gather_on_cuda(const Collective& of, const Call& call, const Gather& gather);

// Where the workspace is.
void run_collective(Pipeline& p);
void run_pair(Pipeline& q, Pipeline& k);
void run_gather(const Collective& of, const Call& call, const Gather& gather);

}  // namespace fused_ops
