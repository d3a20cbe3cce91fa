// Collectives on a CUDA device: which kernel, with which arguments, and where the ranks' memory lies.
#include "collective.h"

#include <cstdio>

#include "cuda.h"

namespace fused_ops {
namespace {

// What fused_ops/_symmetric.py told of a workspace: as Memory there.
struct Memory {
  char* memory[cuda::kMaxRanks];  // of every rank, as this process sees it
  int32_t ranks, rank;
  int64_t bytes;      // of each
  int64_t two_shot_above;  // bytes of a rank
  uint64_t limit;     // nanoseconds
  cuda::Failure* failure;
};

// Workspaces that are open, by where their own memory begins: a tensor is one of them, or is refused.
class Memories {
 public:
  void open(const Memory& memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_[memory.memory[memory.rank]] = memory;
  }
  void close(const void* own) {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_.erase(own);
  }
  Memory of(const Tensor& workspace, int64_t rank) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(workspace.data_ptr());
    STD_TORCH_CHECK(found != known_.end() && found->second.bytes == workspace.numel(),
                    "workspace: expected the buffer of an AllReduceWorkspace that is open");
    STD_TORCH_CHECK(found->second.rank == rank, "rank: expected ", found->second.rank, ", the workspace's");
    return found->second;
  }

 private:
  std::unordered_map<const void*, Memory> known_;
  std::mutex mutex_;
};
Memories memories;

struct Choice {
  cuda::RankStages stages;
  int device;
};
Kernels<Choice> kernels;

std::string text_of(const cuda::RankStages& s) {
  return "RankStages{" + fused_ops::text_of(s.row) + ", " + std::to_string(s.ranks) + ", " + std::to_string(s.two_shot) + ", " +
         std::to_string(s.scattered) + "}";
}

int64_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// As fused_ops/_symmetric.py reads it.
cuda::Call call_of(const Pipeline& p, const Collective& c) {
  const Norm& norm = p.norm;
  const bool weighted = norm.weight;
  const int64_t options = static_cast<bool>(norm) | (weighted && norm.round_before_weight) << 1 |
                          (weighted && norm.weight_plus_one) << 2 | weighted << 3 |
                          (p.load == Pipeline::kAdd) << 4 | c.scattered << 5;
  return {{options, c.rows, p.cols, dtype_of_stage(p.dtype), p.data || p.scale ? p.key.code : -1, bits_of(norm.eps),
           bits_of(p.x_multiplier), 0}};
}

// Stands for a call in flags.
unsigned hash(const cuda::Call& call) {
  uint64_t h = 0;
  for (const int64_t word : call.words) h = (h ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15 ^ h >> 29;
  return static_cast<unsigned>(h >> 32);
}

}  // namespace

void run_on_cuda(Pipeline& p, const Collective& c) {
  const Memory memory = memories.of(*c.workspace, c.rank);
  Choice choice;
  std::memset(&choice, 0, sizeof(choice));
  cuda::RankStages& stages = choice.stages;
  set_stages(stages.row, p);
  stages.ranks = memory.ranks;
  stages.scattered = c.scattered;
  choice.device = p.x.device;

  cuda::Row row = arguments_of(p);
  cuda::Ranks ranks = {};
  std::copy_n(memory.memory, memory.ranks, ranks.memory);
  ranks.rank = memory.rank;
  ranks.slot_bytes = (memory.bytes - static_cast<int64_t>(sizeof(cuda::Mailbox))) / 2 / 16 * 16;
  ranks.limit = memory.limit;
  ranks.failure = memory.failure;
  ranks.all = c.rows;
  ranks.share = (c.rows + memory.ranks - 1) / memory.ranks;
  ranks.call = call_of(p, c);

  const int64_t rows = c.scattered ? ranks.share : c.rows, row_bytes = packs_of(p.cols, p.dtype) * 16;
  const int64_t most = ranks.slot_bytes / row_bytes / (c.scattered ? memory.ranks : 1);
  STD_TORCH_CHECK(most > 0, "workspace: expected room for a row of ", p.cols, " columns of every rank");
  const int64_t per_block = stages.row.block / stages.row.threads;
  void* arguments[] = {&row, &ranks};
  do {
    ranks.end = std::min<int64_t>(rows, ranks.begin + most);
    const int64_t now = ranks.end - ranks.begin, blocks = (now + per_block - 1) / per_block;
    stages.two_shot = !c.scattered && memory.ranks > 1 && now * row_bytes > memory.two_shot_above;
    ranks.blocks = static_cast<int>(std::clamp<int64_t>(blocks, 1, cuda::kMaxBlocks));
    ranks.call.words[7] = ranks.begin << 1 | stages.two_shot;
    ranks.called = hash(ranks.call);
    void* const kernel = kernels.get(choice, [&] { return compiled(text_of(stages), nullptr, choice.device); });
    launch_kernel(kernel, choice.device, ranks.blocks, stages.row.block, arguments);
    ranks.begin = ranks.end;
  } while (ranks.begin < rows);
}

}  // namespace fused_ops

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fused_ops_open_workspace(const fused_ops::Memory* memory) { fused_ops::memories.open(*memory); }

EXPORT void fused_ops_close_workspace(const void* own) { fused_ops::memories.close(own); }
