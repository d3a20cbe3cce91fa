// What host and device agree on: the arguments of a kernel, of rows or of heads, and what it is compiled for.
#pragma once

#include "../quantize.h"

namespace fused_ops {
namespace cuda {

constexpr int kDims = 8, kWarp = 32, kMaxThreads = 1024;

// The rows of a tensor, wherever they lie: leading dimensions, merged where strides (in bytes) allow.
struct Strided {
  char* data;
  int dims;
  long long size[kDims], stride[kDims];
};

// Where scales, or zero points, lie: as ScaleOut in csrc/row.h.
struct ScalePlace {
  char* data;
  long long row_bytes, four, one;
};

struct Row {
  long long rows;
  Strided x, other, sum, y, data;
  const void *post_weight, *weight, *bias;
  float post_eps, eps, x_multiplier, alpha, limit;
  const void* tokens_per_expert;
  long long rows_per_expert;
  const float* given;     // a static scale, NVFP4's scale2, or the upper bound of amax; may be null
  const int* given_zero;  // of a static asymmetric key
  ScalePlace scale, zero_point;
  int* tensor_amax;  // magnitude bits of the largest result
};

enum Dtype : int { kNothing = 0, kBf16 = 1, kFp16 = 2, kFp32 = 3 };
enum Load : int { kCopy, kAdd, kSilu, kGeluTanh, kSwigluOai, kRelu2 };  // as Pipeline::Load
enum NormKind : int { kNoNorm, kRmsNorm, kLayerNorm };                  // as Norm::Kind

struct NormStage {
  NormKind kind;
  Dtype weight, bias;
  bool round_before_weight, weight_plus_one;
};

struct Stages {
  Dtype dtype;  // S
  int cols;
  int threads;   // of a row
  int block;     // threads of a block
  bool aligned;  // every row of every tensor is aligned for whole packs, of which its length is a multiple
  bool flat;     // the rows of every tensor lie at one stride

  Load load;
  bool multiplied, round_activation, interleaved;
  int expert_bytes;  // of an element of tokens_per_expert

  NormStage post, norm;
  bool sum, y, data, scale, zero_point;  // outputs
  int y_cols;                            // with padding
  long long key;
  // One scale for the whole tensor takes two launches: one collects amax, the other quantizes by it.
  bool collect_amax, by_tensor_amax;
};

// --- heads (rope.cuh) ---

// Where the heads of tokens lie, and where in a paged cache: as Place and CachePlace in csrc/rope.h.
struct Place {
  char* data;
  long long token, head;
};
struct CachePlace {
  char* data;
  long long block, slot, head;
  const float* scale;
  long long scale_step;  // from head to head
};

// q, k, v or the gate: `count` heads for each token, by so many blocks.
struct Heads {
  Place in, out;
  CachePlace cache;
  int count;
  unsigned blocks;
  const void* weight;
  float eps;
};

struct Tokens {
  long long tokens;
  Heads q, k, v, gate;
  Row codes;  // of q
  const char* table;
  long long table_rows, table_stride;
  const void *positions, *slots;
  long long axis_stride, slot_count, slots_in_cache, block_size;
  bool long_positions, long_slots;
};

struct HeadStages {
  int cols, threads;              // of a head; no threads: there are no such heads
  int together;                   // heads that these threads work on at once
  int whole_cols, whole_threads;  // of a token, where a norm is of all its heads
  bool aligned;                   // as in Stages
  NormStage norm;
  bool rotated, sigmoid, y, data, scale;
  long long key;        // of the codes
  bool flat;            // their rows lie at one stride
  bool cached, coded;   // there is a cache, which holds codes and not S
  long long cache_key;  // of those
};

struct TokenStages {
  Dtype dtype;     // S
  int block;       // threads of a block
  int half;        // pairs that turn
  int mrope;       // as in Rope
  bool positions;  // or row t of the table is token t's
  bool slots;      // there is a cache
  bool neox, round_products, aligned_table;
  HeadStages q, k, v, gate;
};

// --- ranks (collective.cuh) ---

constexpr int kMaxRanks = 16;
constexpr int kMaxBlocks = 64;  // of a launch: all of them must be on the device at once, since blocks wait for blocks

// What a rank calls, for the others to compare with and for people to read: fused_ops/_symmetric.py knows the words.
struct Call {
  long long words[8];
};

// How an exchange failed, in memory of the host that the device writes.
struct Failure {
  unsigned long long reason, rank;
  Call call, theirs;
};
enum Reason : int { kNoFailure, kTimedOut, kOtherCall, kGivenUp };

// The head of a rank's workspace; two slots of rows follow it.
struct Mailbox {
  unsigned calls;    // of this rank so far
  unsigned arrived;  // its blocks that know their number
  unsigned failed;   // the host has been told why
  unsigned broken;   // 1 + the rank that gave up; any rank writes it
  unsigned reserved[28];
  Call call[2];  // what it calls, by parity
  // By parity of the call, exchange of it, block, and the rank that writes it: the call's number and what is called.
  unsigned long long flags[2][2][kMaxBlocks][kMaxRanks];
};

struct Ranks {
  char* memory[kMaxRanks];  // every rank's workspace, its own as well, where this device sees it
  int rank, blocks;
  long long slot_bytes;
  long long begin, end;      // rows that this launch is for: all of them, or, scattered, of each rank's
  long long share, all;      // scattered: rows of a rank, and of all
  unsigned long long limit;  // nanoseconds
  Failure* failure;
  Call call;
  unsigned called;  // stands for it in flags
};

// q and k, of one block's size.
struct PairStages {
  Stages q, k;
  int ranks;
};

// Rows of bytes that are gathered, and up to two sets of scales, or zero points, that go with them.
struct Gather {
  Strided x, y;
  ScalePlace scale[2], result[2];
  char nan;  // the byte that one of x's dtype is made of
};

struct GatherStages {
  int block, ranks;
  bool aligned;  // rows are, for whole packs of 16 bytes
  long long row_bytes;
  int sets, groups, scale_bytes;  // of scales; of a row; of a scale
  bool padded, swizzled;          // results to whole fours of groups, and 128 rows, with zeros
};

// Of a row in a slot: its bytes, then each set of scales.
HOST_DEVICE constexpr long long whole_packs(long long bytes) { return (bytes + 15) / 16 * 16; }
HOST_DEVICE constexpr long long gathered_bytes(const GatherStages& s) {
  return whole_packs(s.row_bytes) + s.sets * whole_packs(s.groups * s.scale_bytes);
}

struct RankStages {
  Stages row;
  int ranks;
  bool two_shot;   // each rank sums some of the columns for all
  bool scattered;  // a rank works on its own rows alone
};

}  // namespace cuda
}  // namespace fused_ops
