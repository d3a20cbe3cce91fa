// Heads on a CUDA device: which kernel, with which arguments.
#include <cstdio>

#include "cuda.h"
#include "rope.h"

namespace fused_ops {
namespace {

constexpr int64_t kMaxHead = 8192;  // bytes: a block's shared memory holds its heads

// Bytes that every head's address is a multiple of.
bool heads_aligned(const char* data, int64_t token, int64_t head, int64_t heads, int64_t bytes) {
  return aligned(data, bytes) && token % bytes == 0 && (heads <= 1 || head % bytes == 0);
}
bool heads_aligned(const Place& place, int64_t heads, int64_t bytes) {
  return heads_aligned(place.data, place.token, place.head, heads, bytes);
}
bool heads_aligned(const CachePlace& cache, int64_t heads, int64_t bytes) {
  return heads_aligned(cache.data, cache.slot, cache.head, heads, bytes) && cache.block % bytes == 0;
}

bool is_aligned(const Rope& p, const Heads& heads, const Pipeline* codes) {
  const int64_t pack = pack_of(p.dtype);
  return heads.cols % pack == 0 && heads_aligned(heads.in, heads.count, 16) &&
         heads_aligned(heads.out, heads.count, 16) &&
         heads_aligned(heads.cache, heads.count, heads.cache.coded ? pack : 16) &&
         aligned_like(heads.norm.weight, heads.norm.weight_dtype, p.dtype) &&
         (!codes || aligned(codes->data, pack / codes->key.codes_per_byte()));
}

cuda::Place place(const Place& place) { return {place.data, place.token, place.head}; }

struct Choice {
  cuda::TokenStages stages;
  int device;
};

// What is chosen for heads of q, k, v or the gate, and what they are launched with.
void set_heads(cuda::HeadStages& s, cuda::Heads& a, const Rope& p, const Heads& heads,
               const Pipeline* codes = nullptr) {
  const CachePlace& cache = heads.cache;
  if (!heads.cols || !heads.count || (!heads.out && !cache && !(codes && (codes->data || codes->scale)))) return;
  STD_TORCH_CHECK(heads.cols * byte_size(p.dtype) <= kMaxHead, "the cuda backend serves heads of up to ",
                  kMaxHead / byte_size(p.dtype), " columns, got ", heads.cols);
  s.cols = static_cast<int>(heads.cols);
  s.threads = threads_of(packs_of(heads.cols, p.dtype));
  if (heads.norm && p.whole_vector && heads.rotated) {  // v's norm is of each head
    const int64_t whole = heads.cols * heads.count;
    check_served(whole);
    s.whole_cols = static_cast<int>(whole);
    s.whole_threads = threads_of(packs_of(whole, p.dtype));
  }
  // Of a token, so that what they share is loaded once; many of them, so that as much is on its way from memory.
  s.together = heads.count > 2 && s.threads <= cuda::kWarp ? 4 : heads.count > 1 ? 2 : 1;
  s.aligned = is_aligned(p, heads, codes);
  set_stage(s.norm, heads.norm);
  s.rotated = heads.rotated;
  s.y = static_cast<bool>(heads.out);
  s.cached = static_cast<bool>(cache);
  s.coded = cache && cache.coded;
  s.cache_key = s.coded ? cache.key.code : 0;
  if (codes) {
    s.data = static_cast<bool>(codes->data);
    s.scale = static_cast<bool>(codes->scale);
    s.key = s.data || s.scale ? codes->key.code : 0;
    s.flat = codes->data.dims <= 1;
  }
  a.in = place(heads.in);
  a.out = place(heads.out);
  a.cache = {cache.data, cache.block, cache.slot, cache.head, cache.scale, cache.scale_per_head};
  STD_TORCH_CHECK(heads.count < 1 << 20, "the cuda backend serves up to a million heads");
  a.count = static_cast<int>(heads.count);
  a.weight = heads.norm.weight;
  a.eps = heads.norm.eps;
}

cuda::Tokens arguments_of(const Rope& p) {
  cuda::Tokens a = {};
  a.tokens = p.tokens;
  a.codes = arguments_of(p.codes);
  a.table = p.table.data;
  a.table_rows = p.table_rows;
  a.table_stride = p.table.token;
  a.positions = p.positions;
  a.long_positions = p.long_positions;
  a.axis_stride = p.axis_stride;
  a.slots = p.slots;
  a.long_slots = p.long_slots;
  a.slot_count = p.slot_count;
  a.slots_in_cache = p.slots_in_cache;
  a.block_size = p.block_size;
  return a;
}

void set_tokens(cuda::TokenStages& s, const Rope& p) {
  s.dtype = dtype_of_stage(p.dtype);
  s.half = static_cast<int>(p.half);
  s.mrope = static_cast<int>(p.mrope);
  s.positions = p.positions;
  s.slots = p.slots;
  s.neox = p.is_neox;
  s.round_products = p.round_products;
  const int64_t bytes = std::min<int64_t>(16, 4 * pack_of(p.dtype) / (p.is_neox ? 1 : 2));
  s.aligned_table = heads_aligned(p.table, 1, bytes) && p.half * 4 % bytes == 0;
}

// The gate as heads of its own.
Heads gate_of(const Rope& p) {
  Heads gate;
  gate.in = p.gate;
  gate.out = p.gate_out;
  gate.count = p.q.count;
  gate.cols = p.gate_cols;
  return gate;
}

// Tokens' rows of codes are followed by those that complete a layout's last unit of 128.
int64_t blocks_of(const cuda::HeadStages& s, const Rope& p, int64_t heads, int block) {
  if (!s.threads) return 0;
  const int64_t rows = s.data && p.codes.scale.swizzled ? (p.codes.rows + 127) / 128 * 128 : p.tokens * heads;
  const int64_t tokens = (rows + heads - 1) / heads;
  const int64_t units = s.whole_cols ? tokens : tokens * ((heads + s.together - 1) / s.together);
  const int64_t together = block / (s.whole_cols ? s.whole_threads : s.threads);
  return (units + together - 1) / together;
}

std::string text_of(const cuda::HeadStages& s) {
  char text[256];
  std::snprintf(text, sizeof(text), "{%d, %d, %d, %d, %d, %d, %s, %d, %d, %d, %d, %d, %lld, %d, %d, %d, %lld}", s.cols,
                s.threads, s.together, s.whole_cols, s.whole_threads, s.aligned, norm_text(s.norm).c_str(), s.rotated,
                s.sigmoid, s.y, s.data, s.scale, s.key, s.flat, s.cached, s.coded, s.cache_key);
  return text;
}

std::string text_of(const cuda::TokenStages& s) {
  char text[96];
  std::snprintf(text, sizeof(text), "TokenStages{(Dtype)%d, %d, %d, %d, %d, %d, %d, %d, %d, ", s.dtype, s.block, s.half,
                s.mrope, s.positions, s.slots, s.neox, s.round_products, s.aligned_table);
  return text + text_of(s.q) + ", " + text_of(s.k) + ", " + text_of(s.v) + ", " + text_of(s.gate) + "}";
}

Kernels<Choice> kernels;

}  // namespace

void run_on_cuda(Rope& p) {
  if (!p.tokens) return;
  Choice choice;
  std::memset(&choice, 0, sizeof(choice));  // padding too, since its bytes are a key
  choice.device = p.device;
  cuda::TokenStages& s = choice.stages;
  cuda::Tokens a = arguments_of(p);
  set_tokens(s, p);
  set_heads(s.q, a.q, p, p.q, &p.codes);
  set_heads(s.k, a.k, p, p.k);
  set_heads(s.v, a.v, p, p.v);
  set_heads(s.gate, a.gate, p, gate_of(p));
  s.gate.sigmoid = s.gate.threads;

  s.block = 128;
  for (const cuda::HeadStages* heads : {&s.q, &s.k, &s.v, &s.gate})
    s.block = std::max({s.block, heads->threads, heads->whole_threads});
  int64_t blocks = 0;
  const auto count = [&](const cuda::HeadStages& stages, cuda::Heads& heads) {
    const int64_t of_these = blocks_of(stages, p, heads.count, s.block);
    heads.blocks = static_cast<unsigned>(of_these);  // more are refused with the launch
    blocks += of_these;
  };
  count(s.q, a.q);
  count(s.k, a.k);
  count(s.v, a.v);
  count(s.gate, a.gate);
  if (!blocks) return;
  void* const kernel = kernels.get(choice, [&] { return compiled(text_of(s), nullptr, p.device); });
  void* arguments[] = {&a};
  launch_kernel(kernel, p.device, blocks, s.block, arguments);
}

}  // namespace fused_ops
