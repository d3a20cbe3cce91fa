// Collectives on a CUDA device: which kernel, with which arguments, and where the ranks' memory lies.
#include <cstdio>

#include "collective.h"
#include "cuda.h"

namespace fused_ops {
namespace {

// What fused_ops/_symmetric.py tells of a workspace: as _Memory there.
struct Workspace {
  char* memory[cuda::kMaxRanks];  // of every rank, as this process sees it
  int32_t ranks, rank;
  int64_t bytes;  // of each
  int64_t two_shot_above;
  uint64_t limit;  // nanoseconds
  cuda::Failure* failure;
  const int64_t* refused;  // how many calls the rank has refused by itself
};

// Workspaces that are open, by where their own memory begins: a tensor is one of them, or is refused.
class Workspaces {
 public:
  void open(const Workspace& memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_[memory.memory[memory.rank]] = memory;
  }
  void close(const void* own) {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_.erase(own);
  }
  Workspace of(const void* own) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(own);
    STD_TORCH_CHECK(found != known_.end(), "workspace: expected the buffer of an AllReduceWorkspace that is open");
    return found->second;
  }

 private:
  std::unordered_map<const void*, Workspace> known_;
  std::mutex mutex_;
};
Workspaces workspaces;

template <class S>
struct Choice {
  S stages;
  int device;
};

std::string text_of(const cuda::RankStages& s) {
  return "RankStages{" + fused_ops::text_of(s.row) + ", " + std::to_string(s.ranks) + ", " +
         std::to_string(s.two_shot) + ", " + std::to_string(s.scattered) + "}";
}

std::string text_of(const cuda::PairStages& s) {
  return "PairStages{" + fused_ops::text_of(s.q) + ", " + fused_ops::text_of(s.k) + ", " + std::to_string(s.ranks) +
         "}";
}

std::string text_of(const cuda::GatherStages& s) {
  char text[160];
  std::snprintf(text, sizeof(text), "GatherStages{%d, %d, %d, %lld, %d, %d, %d, %d, %d}", s.block, s.ranks, s.aligned,
                s.row_bytes, s.sets, s.groups, s.scale_bytes, s.padded, s.swizzled);
  return text;
}

// The kernel of these stages, with the arguments and then `ranks`.
template <class S>
void launch(const S& stages, int device, int threads, void* const* arguments, int count, cuda::Ranks& ranks) {
  static Kernels<Choice<S>> kernels;
  Choice<S> choice;
  std::memset(&choice, 0, sizeof(choice));
  std::memcpy(&choice.stages, &stages, sizeof(stages));
  choice.device = device;
  void* const kernel = kernels.get(choice, [&] { return compiled(text_of(stages), nullptr, device); });
  void* all[4];
  std::copy_n(arguments, count, all);
  all[count] = &ranks;
  launch_kernel(kernel, device, ranks.blocks, threads, all);
}

// The byte that a NaN may be made of: all bits, but where there is no negative zero.
char nan_of(int64_t dtype) {
  const bool fnuz = dtype == aoti_torch_dtype_float8_e4m3fnuz() || dtype == aoti_torch_dtype_float8_e5m2fnuz();
  return static_cast<char>(fnuz ? 0x80 : 0xff);
}

int64_t bits_of(double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

// Bits of a call's first word; above them are the calls that the rank has refused, so that it differs where the others
// haven't.
enum Options { kNorms = 1, kRoundBefore = 2, kPlusOne = 4, kWeight = 8, kAdds = 16, kScattered = 32, kGathers = 64 };
constexpr int kSquares = 128, kRefusedFrom = 32;

// As fused_ops/_symmetric.py reads it.
cuda::Call call_of_rows(const Pipeline& p, int options) {
  const Norm& norm = p.norm;
  if (norm) options |= kNorms;
  if (norm.weight) options |= kWeight | norm.round_before_weight * kRoundBefore | norm.weight_plus_one * kPlusOne;
  if (p.load == Pipeline::kAdd) options |= kAdds;
  if (p.collective.scattered) options |= kScattered;
  const int64_t key = p.quantizes ? p.key.code : -1;
  return {{options, p.x.count, p.cols, dtype_of_stage(p.dtype), key, bits_of(norm.eps), bits_of(p.x_multiplier), 0}};
}

// What all launches of a call have in common.
cuda::Ranks ranks_of(const Workspace& memory, int64_t rows, const cuda::Call& call) {
  cuda::Ranks ranks = {};
  std::copy_n(memory.memory, memory.ranks, ranks.memory);
  ranks.rank = memory.rank;
  ranks.slot_bytes = (memory.bytes - static_cast<int64_t>(sizeof(cuda::Mailbox))) / 32 * 16;
  ranks.limit = memory.limit;
  ranks.failure = memory.failure;
  ranks.all = rows;
  ranks.share = (rows + memory.ranks - 1) / memory.ranks;
  ranks.call = call;
  ranks.call.words[0] |= *memory.refused << kRefusedFrom;
  return ranks;
}

// run() for as many rows at once as a slot holds, and at least once.
template <class Run>
void in_parts(cuda::Ranks& ranks, int64_t rows, int64_t row_bytes, int64_t per_block, const Run& run) {
  const int64_t most = ranks.slot_bytes / row_bytes;
  STD_TORCH_CHECK(most > 0, "workspace: a row of ", row_bytes, " bytes doesn't fit into it, expected at most ",
                  ranks.slot_bytes);
  do {
    ranks.end = std::min<int64_t>(rows, ranks.begin + most);
    const int64_t blocks = (ranks.end - ranks.begin + per_block - 1) / per_block;
    ranks.blocks = static_cast<int>(std::clamp<int64_t>(blocks, 1, cuda::kMaxBlocks));
    run();
    ranks.begin = ranks.end;
  } while (ranks.begin < rows);
}

// Of this part of a call.
void set_part(cuda::Ranks& ranks, bool two_shot) {
  ranks.call.words[7] = ranks.begin << 1 | two_shot;
  uint64_t hash = 0;
  for (const int64_t word : ranks.call.words)
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15 ^ hash >> 29;
  ranks.called = static_cast<unsigned>(hash >> 32);
}

}  // namespace

Collective collective_on_cuda(const char* name, const Tensor& workspace, int64_t rank) {
  Collective of;
  of.name = name;
  of.memory = static_cast<char*>(workspace.data_ptr());
  of.bytes = workspace.numel();
  of.rank = rank;
  const Workspace memory = workspaces.of(of.memory);
  STD_TORCH_CHECK(memory.bytes == of.bytes, "workspace: expected all of the buffer of an AllReduceWorkspace");
  STD_TORCH_CHECK(memory.rank == rank, "rank: expected ", memory.rank, ", the workspace's");
  STD_TORCH_CHECK(!__atomic_load_n(&memory.failure->reason, __ATOMIC_ACQUIRE), "workspace: a call has failed");
  of.ranks = memory.ranks;
  return of;
}

void run_collective_on_cuda(Pipeline& p) {
  const Workspace memory = workspaces.of(p.collective.memory);
  const bool scattered = p.collective.scattered;
  cuda::RankStages stages;
  std::memset(&stages, 0, sizeof(stages));
  set_stages(stages.row, p);
  stages.ranks = memory.ranks;
  stages.scattered = scattered;
  cuda::Row row = arguments_of(p);
  cuda::Ranks ranks = ranks_of(memory, p.x.count, call_of_rows(p, 0));
  void* const arguments[] = {&row};
  const int64_t row_bytes = packs_of(p.cols, p.dtype) * 16;
  in_parts(ranks, scattered ? ranks.share : ranks.all, row_bytes * (scattered ? memory.ranks : 1),
           stages.row.block / stages.row.threads, [&] {
             const int64_t bytes = (ranks.end - ranks.begin) * row_bytes;
             stages.two_shot = !scattered && memory.ranks > 1 && bytes > memory.two_shot_above;
             set_part(ranks, stages.two_shot);
             launch(stages, p.x.device, stages.row.block, arguments, 1, ranks);
           });
}

void run_pair_on_cuda(Pipeline& q, Pipeline& k) {
  const Workspace memory = workspaces.of(q.collective.memory);
  cuda::PairStages stages;
  std::memset(&stages, 0, sizeof(stages));
  set_stages(stages.q, q);
  set_stages(stages.k, k);
  stages.q.block = stages.k.block = std::max(stages.q.block, stages.k.block);
  stages.ranks = memory.ranks;
  cuda::Row rows[2] = {arguments_of(q), arguments_of(k)};
  cuda::Call call = call_of_rows(q, kSquares | (k.norm.weight != nullptr) * kAdds);
  call.words[4] = k.cols;
  cuda::Ranks ranks = ranks_of(memory, q.rows, call);
  void* const arguments[] = {&rows[0], &rows[1]};
  const int64_t per_block = stages.q.block / std::max(stages.q.threads, stages.k.threads);
  in_parts(ranks, q.rows, 2 * sizeof(float), per_block, [&] {
    set_part(ranks, false);
    launch(stages, q.x.device, stages.q.block, arguments, 2, ranks);
  });
}

void run_gather_on_cuda(const Collective& of, const Call& call, const Gather& g) {
  const Workspace memory = workspaces.of(of.memory);
  cuda::GatherStages stages;
  std::memset(&stages, 0, sizeof(stages));
  stages.block = 256;
  stages.ranks = memory.ranks;
  stages.row_bytes = g.x.cols;
  stages.aligned = g.x.cols % 16 == 0 && aligned(g.x, 16) && aligned(g.y, 16);
  stages.groups = static_cast<int>(g.groups);
  stages.padded = g.padded;
  cuda::Gather rows = {};
  rows.x = strided(g.x);
  rows.y = strided(g.y);
  rows.nan = nan_of(call.dtype);
  for (int i = 0; i < 2 && g.result[i]; ++i) {  // a rank may have no rows, and so no scales
    stages.sets = i + 1;
    stages.scale_bytes = g.result[i].element;
    stages.swizzled = g.result[i].swizzled;
    rows.scale[i] = place(g.scale[i]);
    rows.result[i] = place(g.result[i]);
  }
  const int64_t row_bytes = cuda::gathered_bytes(stages);
  cuda::Ranks ranks =
      ranks_of(memory, call.rows, {{kGathers, call.rows, g.x.cols, call.dtype, call.key, 0, bits_of(1), 0}});
  void* const arguments[] = {&rows};
  in_parts(ranks, ranks.share, std::max<int64_t>(row_bytes, 16), 1, [&] {
    set_part(ranks, false);
    launch(stages, g.x.device, stages.block, arguments, 1, ranks);
  });
}

}  // namespace fused_ops

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fused_ops_open_workspace(const fused_ops::Workspace* memory) { fused_ops::workspaces.open(*memory); }

EXPORT void fused_ops_close_workspace(const void* own) { fused_ops::workspaces.close(own); }
