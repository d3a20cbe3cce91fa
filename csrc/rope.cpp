#include "rope.h"

#include "row_op.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;

constexpr int64_t kNoKey = -1;

// [T, heads, columns]; [T, columns] is of one head.
Place place_of(T tensor, const char* name) {
  const auto strides = tensor.strides(), sizes = tensor.sizes();
  const size_t dims = sizes.size();
  STD_TORCH_CHECK(dims == 2 || dims == 3, name, ": unexpected shape");
  STD_TORCH_CHECK(sizes[dims - 1] <= 1 || strides[dims - 1] == 1, name, ": expected a contiguous last dimension");
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  return {static_cast<char*>(tensor.data_ptr()), strides[0] * bytes, dims == 3 ? strides[1] * bytes : 0};
}

void check_one_of(const Rope& p, T tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype && device_of(tensor, name) == p.device, name,
                  ": unexpected dtype or device");
}

bool is_long(const Rope& p, T tensor, const char* name) {
  const ScalarType dtype = dtype_of(tensor);
  STD_TORCH_CHECK((dtype == ScalarType::Long || dtype == ScalarType::Int) && device_of(tensor, name) == p.device, name,
                  ": expected int64 or int32 on q's device");
  return dtype == ScalarType::Long;
}

void set_heads(Heads& heads, const Rope& p, T tensor, const char* name) {
  check_one_of(p, tensor, p.dtype, name);
  heads.in = place_of(tensor, name);
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(tensor.size(0) == p.tokens, name, ": expected as many tokens as q");
  heads.count = dims == 3 ? tensor.size(1) : 1;
  heads.cols = tensor.size(dims - 1);
}

// On the CPU every position and slot is looked at before anything is written; a CUDA kernel checks its own.
void check_range(const Rope& p, int64_t count, int64_t low, int64_t high, int64_t (*of)(const Rope&, int64_t),
                 const char* name) {
  if (on_cuda(p.device)) return;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = of(p, i);
    STD_TORCH_CHECK(value >= low && value <= high, name, ": has ", value, ", expected ", low, " to ", high);
  }
}

Rope rope_of(T q, T k, OptionalT positions, T table, int64_t flags, int64_t mrope, int64_t known, int64_t k_dims = 3) {
  Rope p;
  p.device = device_of(q, "q");
  p.dtype = dtype_of(q);
  STD_TORCH_CHECK(is_float(p.dtype) && q.dim() == 3, "q: expected [T, heads, D] of bfloat16, float16 or float32");
  p.tokens = q.size(0);
  set_heads(p.q, p, q, "q");
  set_heads(p.k, p, k, "k");
  STD_TORCH_CHECK(k.dim() == k_dims && p.k.cols == p.q.cols, "k: expected heads as wide as q's");
  p.q.rotated = p.k.rotated = true;

  STD_TORCH_CHECK(flags >= 0 && !(flags & ~known), "flags: unexpected bits");
  p.is_neox = flags & Rope::kIsNeox;
  p.round_products = flags & Rope::kRoundProducts;
  p.whole_vector = flags & Rope::kWholeVector;

  check_one_of(p, table, ScalarType::Float, "cos_sin_cache");
  STD_TORCH_CHECK(table.dim() == 2, "cos_sin_cache: unexpected shape");
  p.table = place_of(table, "cos_sin_cache");
  p.table_rows = table.size(0);
  p.half = table.size(1) / 2;
  STD_TORCH_CHECK(table.size(1) % 2 == 0 && table.size(1) <= p.q.cols,
                  "cos_sin_cache: expected an even width up to q's");

  STD_TORCH_CHECK(mrope >= 0 && mrope < int64_t{1} << 31, "mrope: unexpected bits");
  p.mrope = mrope;
  STD_TORCH_CHECK(!mrope || (mrope & 1023) + (mrope >> 10 & 1023) + (mrope >> 20 & 1023) == p.half,
                  "mrope_section: expected a sum of half the columns of cos_sin_cache");
  if (!positions) {
    STD_TORCH_CHECK(!mrope && p.table_rows == p.tokens, "cos_sin_cache: expected a row for each token");
    return p;
  }
  const int64_t axes = mrope ? 3 : 1, dims = mrope ? 2 : 1;
  p.long_positions = is_long(p, *positions, "positions");
  STD_TORCH_CHECK(
      positions->dim() == dims && positions->size(dims - 1) == p.tokens && (!mrope || positions->size(0) == 3),
      "positions: unexpected shape");
  STD_TORCH_CHECK(p.tokens <= 1 || positions->stride(dims - 1) == 1, "positions: expected a contiguous last dimension");
  STD_TORCH_CHECK(p.table_rows || !p.tokens, "cos_sin_cache: expected a row for each position");
  p.positions = positions->data_ptr();
  p.axis_stride = mrope ? positions->stride(0) : 0;
  check_range(
      p, axes * p.tokens, 0, p.table_rows - 1,
      [](const Rope& r, int64_t i) { return r.position(i % r.tokens, static_cast<int>(i / r.tokens)); }, "positions");
  return p;
}

void set_norms(Rope& p, OptionalT q_weight, OptionalT k_weight, double eps, int64_t flags) {
  const auto norm = [&](const Heads& heads, OptionalT weight) {
    Pipeline rows;
    rows.x.device = p.device;
    rows.cols = heads.cols * (p.whole_vector ? heads.count : 1);
    STD_TORCH_CHECK(rows.cols > 0, "q, k: expected at least one column");
    return norm_of(rows, Norm::kRms, weight, {}, eps, flags & 3);
  };
  p.q.norm = norm(p.q, q_weight);
  p.k.norm = norm(p.k, k_weight);
  if (flags & Rope::kNormV) {
    STD_TORCH_CHECK(p.v.cols > 0, "v: expected at least one column");
    p.v.norm.kind = Norm::kRms;
    p.v.norm.eps = static_cast<float>(eps);
  }
}

// [blocks, block_size, heads, columns], of columns [first, first + cols) of which the heads are.
void set_cache(Rope& p, Heads& heads, T cache, OptionalT scale, int64_t first, const char* name) {
  const int64_t dims = cache.dim();
  STD_TORCH_CHECK(dims == 3 || dims == 4, name, ": unexpected shape");
  STD_TORCH_CHECK(device_of(cache, name) == p.device, name, ": expected q's device");
  STD_TORCH_CHECK(cache.size(dims - 1) <= 1 || cache.stride(dims - 1) == 1, name,
                  ": expected a contiguous last dimension");
  STD_TORCH_CHECK((dims == 4 ? cache.size(2) : 1) == heads.count, name, ": unexpected shape");
  const int64_t bytes = static_cast<int64_t>(cache.element_size());
  CachePlace& place = heads.cache;
  place.data = static_cast<char*>(cache.data_ptr()) + first * bytes;
  place.block = cache.stride(0) * bytes;
  place.slot = cache.stride(1) * bytes;
  place.head = dims == 4 ? cache.stride(2) * bytes : 0;

  const ScalarType dtype = dtype_of(cache);
  place.coded = dtype != p.dtype;
  const int format = dtype == ScalarType::Char              ? Key::kInt8
                     : dtype == ScalarType::Float8_e4m3fnuz ? Key::kE4m3Fnuz
                                                            : Key::kE4m3;
  STD_TORCH_CHECK(!place.coded || format != Key::kE4m3 || dtype == ScalarType::Float8_e4m3fn, name,
                  ": expected q's dtype, an eight-bit float or int8");
  STD_TORCH_CHECK(place.coded == scale.has_value(), name, ": codes take a scale, and nothing else does");
  constexpr int kStatic = 1 << 4, kPerTensor = 1 << 7;
  place.key = Key{format | kStatic | kPerTensor};
  if (scale) {
    check_one_of(p, *scale, ScalarType::Float, "scale");
    const int64_t count = scale->numel();
    STD_TORCH_CHECK(scale->dim() == 1 && (count == 1 || (count == heads.count && scale->stride(0) == 1)),
                    "scale: expected one, or one for each head");
    place.scale = static_cast<const float*>(scale->data_ptr());
    place.scale_per_head = count > 1;
  }
}

void set_slots(Rope& p, T slots, T cache) {
  p.long_slots = is_long(p, slots, "slot_mapping");
  STD_TORCH_CHECK(slots.dim() == 1 && slots.size(0) <= p.tokens && (slots.size(0) <= 1 || slots.stride(0) == 1),
                  "slot_mapping: expected at most one a token");
  p.slots = slots.data_ptr();
  p.slot_count = slots.size(0);
  p.block_size = std::max<int64_t>(1, cache.size(1));
  p.slots_in_cache = cache.size(0) * cache.size(1);
  check_range(
      p, p.slot_count, -1, p.slots_in_cache - 1, [](const Rope& r, int64_t t) { return r.slot(t); }, "slot_mapping");
}

void set_caches(Rope& p, T v, T k_cache, T v_cache, T slots, OptionalT k_scale, OptionalT v_scale) {
  set_heads(p.v, p, v, "v");
  STD_TORCH_CHECK(v.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4 && p.v.count == p.k.count,
                  "v, k_cache, v_cache: unexpected shape");
  STD_TORCH_CHECK(k_cache.size(3) == p.k.cols && v_cache.size(3) == p.v.cols && k_cache.size(0) == v_cache.size(0) &&
                      k_cache.size(1) == v_cache.size(1) && dtype_of(k_cache) == dtype_of(v_cache),
                  "k_cache, v_cache: unexpected shape or dtype");
  set_cache(p, p.k, k_cache, k_scale, 0, "k_cache");
  set_cache(p, p.v, v_cache, v_scale, 0, "v_cache");
  set_slots(p, slots, k_cache);
}

void set_out(Rope& p, Heads& heads, OptionalT out, T like, const char* name) {
  if (!out) return;
  rows_like(*out, name, like, heads.cols, p.dtype);
  heads.out = place_of(*out, name);
}

Tensor new_out(const Rope& p, Heads& heads, T like) {
  Rows rows;
  Tensor out = empty_rows(like, heads.cols, p.dtype, rows);
  heads.out = {rows.data, heads.count * rows.stride[0], rows.stride[0]};
  return out;
}

void set_gate(Rope& p, OptionalT gate, OptionalT out) {
  STD_TORCH_CHECK(!out || gate, "gate_out: there is no gate");
  if (!gate) return;
  check_one_of(p, *gate, p.dtype, "gate");
  STD_TORCH_CHECK(gate->dim() == 3 && gate->size(0) == p.tokens && gate->size(1) == p.q.count,
                  "gate: expected q's heads");
  p.gate_cols = gate->size(2);
  p.gate = place_of(*gate, "gate");
  if (!out) return;
  rows_like(*out, "gate_out", *gate, p.gate_cols, p.dtype);
  p.gate_out = place_of(*out, "gate_out");
}

// q's heads as rows to quantize.
void set_codes(Rope& p, T q, int64_t key, OptionalT given, OptionalT data, OptionalT scale) {
  if (key == kNoKey) {
    STD_TORCH_CHECK(!given && !scale, "q_given, q_scale_out: q isn't quantized");
    return set_out(p, p.q, data, q, "q_out");
  }
  STD_TORCH_CHECK(p.q.cols > 0, "q: expected at least one column");
  p.codes.x.device = p.device;
  p.codes.rows = p.tokens * p.q.count;
  p.codes.cols = p.q.cols;
  p.codes.dtype = p.dtype;
  set_key(p.codes, key, given, {});
  const Key& made = p.codes.key;
  STD_TORCH_CHECK(!made.asymmetric() && made.scale_format() != Key::kScaleE4m3 &&
                      (made.is_static() || !(made.per_tensor() || given)),
                  "q_key: expected a symmetric key, static or with scales by head alone");
  set_quantized(p.codes, q, data, scale, {}, {});
}

constexpr int64_t kRotary = Rope::kIsNeox | Rope::kRoundProducts, kNorms = 3 | Rope::kWholeVector;

// A call: what it does, and what it reads and writes.
struct Call {
  Rope p;
  Memory memory;

  Call(T q, T k, OptionalT positions, T table, int64_t flags, int64_t mrope, int64_t known, int64_t k_dims = 3)
      : p(rope_of(q, k, positions, table, flags, mrope, known, k_dims)) {
    memory.reads(q, "q");
    memory.reads(k, "k");
    memory.reads(positions, "positions");
    memory.reads(table, "cos_sin_cache");
  }

  void norms(OptionalT q_weight, OptionalT k_weight, double eps, int64_t flags) {
    set_norms(p, q_weight, k_weight, eps, flags);
    memory.reads(q_weight, "q_weight");
    memory.reads(k_weight, "k_weight");
  }

  void caches(T v, T k_cache, T v_cache, T slots, OptionalT k_scale, OptionalT v_scale) {
    set_caches(p, v, k_cache, v_cache, slots, k_scale, v_scale);
    memory.reads(v, "v");
    memory.writes(k_cache, "k_cache");
    memory.writes(v_cache, "v_cache");
    memory.reads(slots, "slot_mapping");
    memory.reads(k_scale, "k_scale");
    memory.reads(v_scale, "v_scale");
  }

  // Of MLA: k is the one rotated head, v the latent, side by side in a row of the cache.
  void latents(T kv_c, T kv_cache, T slots, OptionalT kv_scale) {
    STD_TORCH_CHECK(kv_c.dim() == 2 && kv_cache.dim() == 3, "kv_c, kv_cache: unexpected shape");
    set_heads(p.v, p, kv_c, "kv_c");
    STD_TORCH_CHECK(kv_cache.size(2) == p.v.cols + p.k.cols, "kv_cache: unexpected shape");
    set_cache(p, p.k, kv_cache, kv_scale, p.v.cols, "kv_cache");
    set_cache(p, p.v, kv_cache, kv_scale, 0, "kv_cache");
    set_slots(p, slots, kv_cache);
    memory.reads(kv_c, "kv_c");
    memory.writes(kv_cache, "kv_cache");
    memory.reads(slots, "slot_mapping");
    memory.reads(kv_scale, "kv_scale");
  }

  void gate(OptionalT gate, OptionalT out) {
    set_gate(p, gate, out);
    memory.reads(gate, "gate");
    if (out) memory.writes(*out, "gate_out");
  }

  void outs(T q, OptionalT q_out, const Tensor* k = nullptr, OptionalT k_out = {}, int64_t key = kNoKey,
            OptionalT given = {}, OptionalT scale_out = {}) {
    set_codes(p, q, key, given, q_out, scale_out);
    if (q_out) memory.writes(*q_out, "q_out", &q);
    if (k_out) set_out(p, p.k, k_out, *k, "k_out");
    if (k_out) memory.writes(*k_out, "k_out", k);
    memory.reads(given, "q_scale");
    if (scale_out) memory.writes(*scale_out, "q_scale_out");
  }

  void run() {
    memory.check();
    on_cuda(p.device) ? run_on_cuda(p) : run_on_cpu(p);
  }
  Tensor run_for_q(T q) {
    Tensor out = new_out(p, p.q, q);
    run();
    return out;
  }
  std::tuple<Tensor, Tensor> run_for_both(T q, T k) {
    Tensor q_out = new_out(p, p.q, q), k_out = new_out(p, p.k, k);
    run();
    return {std::move(q_out), std::move(k_out)};
  }
};

std::tuple<Tensor, Tensor> rope(T q, T k, OptionalT positions, T table, int64_t flags, int64_t mrope) {
  return Call(q, k, positions, table, flags, mrope, kRotary).run_for_both(q, k);
}

void rope_out(T q, T k, OptionalT positions, T table, int64_t flags, int64_t mrope, OptionalT q_out, OptionalT k_out) {
  Call call(q, k, positions, table, flags, mrope, kRotary);
  call.outs(q, q_out, &k, k_out);
  call.run();
}

std::tuple<Tensor, Tensor> qk_norm_rope(T q, T k, OptionalT positions, T table, OptionalT q_weight, OptionalT k_weight,
                                        double eps, int64_t flags, int64_t mrope) {
  Call call(q, k, positions, table, flags, mrope, kRotary | kNorms);
  call.norms(q_weight, k_weight, eps, flags);
  return call.run_for_both(q, k);
}

void qk_norm_rope_out(T q, T k, OptionalT positions, T table, OptionalT q_weight, OptionalT k_weight, double eps,
                      int64_t flags, int64_t mrope, OptionalT gate, OptionalT q_out, OptionalT k_out,
                      OptionalT gate_out) {
  Call call(q, k, positions, table, flags, mrope, kRotary | kNorms);
  call.norms(q_weight, k_weight, eps, flags);
  call.gate(gate, gate_out);
  call.outs(q, q_out, &k, k_out);
  call.run();
}

Tensor rope_kv_cache_write(T q, T k, T v, OptionalT positions, T table, T k_cache, T v_cache, T slots,
                           OptionalT k_scale, OptionalT v_scale, int64_t flags, int64_t mrope) {
  Call call(q, k, positions, table, flags, mrope, kRotary);
  call.caches(v, k_cache, v_cache, slots, k_scale, v_scale);
  return call.run_for_q(q);
}

void rope_kv_cache_write_out(T q, T k, T v, OptionalT positions, T table, T k_cache, T v_cache, T slots,
                             OptionalT k_scale, OptionalT v_scale, int64_t flags, int64_t mrope, int64_t q_key,
                             OptionalT q_given, OptionalT q_out, OptionalT k_out, OptionalT q_scale_out) {
  Call call(q, k, positions, table, flags, mrope, kRotary);
  call.caches(v, k_cache, v_cache, slots, k_scale, v_scale);
  call.outs(q, q_out, &k, k_out, q_key, q_given, q_scale_out);
  call.run();
}

Tensor qk_norm_rope_kv_cache_write(T q, T k, T v, OptionalT positions, T table, OptionalT q_weight, OptionalT k_weight,
                                   double eps, T k_cache, T v_cache, T slots, OptionalT k_scale, OptionalT v_scale,
                                   int64_t flags, int64_t mrope) {
  Call call(q, k, positions, table, flags, mrope, kRotary | kNorms | Rope::kNormV);
  call.caches(v, k_cache, v_cache, slots, k_scale, v_scale);
  call.norms(q_weight, k_weight, eps, flags);
  return call.run_for_q(q);
}

void qk_norm_rope_kv_cache_write_out(T q, T k, T v, OptionalT positions, T table, OptionalT q_weight,
                                     OptionalT k_weight, double eps, T k_cache, T v_cache, T slots, OptionalT k_scale,
                                     OptionalT v_scale, int64_t flags, int64_t mrope, int64_t q_key, OptionalT q_given,
                                     OptionalT gate, OptionalT q_out, OptionalT k_out, OptionalT q_scale_out,
                                     OptionalT gate_out) {
  Call call(q, k, positions, table, flags, mrope, kRotary | kNorms | Rope::kNormV);
  call.caches(v, k_cache, v_cache, slots, k_scale, v_scale);
  call.norms(q_weight, k_weight, eps, flags);
  call.gate(gate, gate_out);
  call.outs(q, q_out, &k, k_out, q_key, q_given, q_scale_out);
  call.run();
}

Tensor mla_rope_kv_cache_concat(T q_pe, T k_pe, T kv_c, OptionalT positions, T table, T kv_cache, T slots,
                                OptionalT kv_scale, int64_t flags) {
  Call call(q_pe, k_pe, positions, table, flags, 0, kRotary, 2);
  call.latents(kv_c, kv_cache, slots, kv_scale);
  return call.run_for_q(q_pe);
}

void mla_rope_kv_cache_concat_out(T q_pe, T k_pe, T kv_c, OptionalT positions, T table, T kv_cache, T slots,
                                  OptionalT kv_scale, int64_t flags, OptionalT out) {
  Call call(q_pe, k_pe, positions, table, flags, 0, kRotary, 2);
  call.latents(kv_c, kv_cache, slots, kv_scale);
  call.outs(q_pe, out);
  call.run();
}

}  // namespace

void implement_rope(Library& m) {
#define IMPLEMENT(name)                   \
  add_kernel<TORCH_BOX(&name)>(m, #name); \
  add_kernel<TORCH_BOX(&name##_out)>(m, #name ".out")
  IMPLEMENT(rope);
  IMPLEMENT(qk_norm_rope);
  IMPLEMENT(rope_kv_cache_write);
  IMPLEMENT(qk_norm_rope_kv_cache_write);
  IMPLEMENT(mla_rope_kv_cache_concat);
#undef IMPLEMENT
}

}  // namespace fused_ops
