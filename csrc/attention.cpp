#include "attention.h"

#include <limits>

#include "kernel.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;

void check_dims(T tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dimensions");
  STD_TORCH_CHECK(device_of(tensor, name) == kCpu, name, ": expected q's device");
  STD_TORCH_CHECK(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1, name,
                  ": expected a contiguous last dimension");
}

Place heads_of(T tensor, ScalarType dtype, const char* name) {
  check_dims(tensor, 3, name);
  STD_TORCH_CHECK(dtype_of(tensor) == dtype, name, ": unexpected dtype");
  const int64_t bytes = byte_size(dtype);
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * bytes, tensor.stride(1) * bytes};
}

Weight weight_of(T tensor, ScalarType dtype, int64_t heads, const char* name) {
  const Place rows = heads_of(tensor, dtype, name);
  STD_TORCH_CHECK(tensor.size(0) == heads, name, ": expected as many heads as q");
  return {rows.data, rows.token, rows.head, tensor.size(1)};
}

// [blocks, block_size, heads, columns], or of one head without its dimension; of the columns that the heads are.
Cached cache_of(T cache, int64_t dims, OptionalT scale, ScalarType dtype, const char* name) {
  check_dims(cache, dims, name);
  Cached c;
  c.dtype = dtype_of(cache);
  const bool coded =
      c.dtype == ScalarType::Float8_e4m3fn || c.dtype == ScalarType::Float8_e4m3fnuz || c.dtype == ScalarType::Char;
  STD_TORCH_CHECK(coded || c.dtype == dtype, name, ": expected q's dtype, an eight-bit float or int8");
  const int64_t bytes = byte_size(c.dtype);
  c.data = static_cast<const char*>(cache.data_ptr());
  c.block = cache.stride(0) * bytes;
  c.slot = cache.stride(1) * bytes;
  c.head = dims == 4 ? cache.stride(2) * bytes : 0;
  c.cols = cache.size(dims - 1);
  STD_TORCH_CHECK(scale.has_value() == coded, name, ": codes take a scale, and nothing else does");
  if (!scale) return c;
  check_dims(*scale, 1, "scale");
  const int64_t heads = dims == 4 ? cache.size(2) : 1, count = scale->size(0);
  STD_TORCH_CHECK(dtype_of(*scale) == ScalarType::Float && (count == 1 || count == heads),
                  "scale: expected one float32, or one for each head");
  c.scale = static_cast<const float*>(scale->data_ptr());
  c.scale_stride = count > 1;
  return c;
}

Numbers numbers_of(T tensor, int64_t dims, const char* name) {
  check_dims(tensor, dims, name);
  const ScalarType dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, name, ": expected int64 or int32");
  return {tensor.data_ptr(), dtype == ScalarType::Long};
}

constexpr int64_t kMostTokens = int64_t{1} << 62;  // of a sequence, so that rounding up can't overflow

void set_sequences(Attention& p, T cache, T block_tables, T seq_lens, T query_start_loc, int64_t tokens) {
  p.tables = numbers_of(block_tables, 2, "block_tables");
  p.table_stride = block_tables.stride(0);
  const Numbers lengths = numbers_of(seq_lens, 1, "seq_lens"),
                starts = numbers_of(query_start_loc, 1, "query_start_loc");
  const int64_t count = seq_lens.size(0), blocks = cache.size(0), size = cache.size(1);
  STD_TORCH_CHECK(block_tables.size(0) == count && query_start_loc.size(0) == count + 1,
                  "block_tables, seq_lens, query_start_loc: expected as many sequences");
  STD_TORCH_CHECK(starts[0] == 0, "query_start_loc: starts with ", starts[0], ", expected 0");
  p.block_size = std::max<int64_t>(1, size);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = starts[i], end = starts[i + 1], length = lengths[i];
    STD_TORCH_CHECK(start <= end && end <= tokens, "query_start_loc: goes from ", start, " to ", end, " at ", i,
                    ", expected no less, up to ", tokens);
    // By division, since a block may seem to have any number of tokens, all in one place.
    const int64_t used = length / p.block_size + (length % p.block_size != 0);
    STD_TORCH_CHECK(end - start <= length && length <= kMostTokens && used <= block_tables.size(1) && (size || !length),
                    "seq_lens: has ", length, " at ", i, ", expected at least the ", end - start,
                    " queries, and no more than ", block_tables.size(1), " blocks of ", size, " tokens");
    // Blocks that lie behind the window of the first query, and so of all, may be gone.
    const int64_t seen = p.window ? std::max<int64_t>(0, length - (end - start) + 1 - p.window) : 0;
    for (int64_t j = seen / p.block_size; j < used; ++j) {
      const int64_t block = p.tables[i * p.table_stride + j];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "block_tables: has ", block, " at [", i, ", ", j,
                      "], expected a block of ", blocks);
    }
    if (start < end) p.sequences.push_back({i, start, end - start, length});
  }
  p.used = starts[count];
}

// Of the result, [tokens, heads * columns].
void set_rows(Attention& p, int64_t tokens, int64_t cols, ScalarType dtype) {
  p.out.rows = tokens;
  p.out.cols = p.heads * cols;
  p.out.dtype = dtype;
  STD_TORCH_CHECK(p.k.cols > 0 && p.out.cols > 0, "heads: expected at least one column");
}

Attention attention_of(T q, T k_cache, T v_cache, T block_tables, T seq_lens, T query_start_loc, double scale,
                       bool causal, int64_t window, double cap, OptionalT sinks, OptionalT k_scale, OptionalT v_scale) {
  Attention p;
  p.q_dtype = dtype_of(q);
  STD_TORCH_CHECK(is_float(p.q_dtype), "q: expected bfloat16, float16 or float32");
  p.q = heads_of(q, p.q_dtype, "q");
  p.heads = q.size(1);
  p.k = cache_of(k_cache, 4, k_scale, p.q_dtype, "k_cache");
  p.v = cache_of(v_cache, 4, v_scale, p.q_dtype, "v_cache");
  p.kv_heads = k_cache.size(2);
  STD_TORCH_CHECK(p.k.cols == q.size(2), "k_cache: expected heads as wide as q's");
  STD_TORCH_CHECK(p.v.dtype == p.k.dtype, "v_cache: expected k_cache's dtype");
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(v_cache.size(d) == k_cache.size(d), "v_cache: unexpected shape");
  STD_TORCH_CHECK(p.kv_heads && p.heads % p.kv_heads == 0, "q: expected a multiple of k_cache's heads");

  STD_TORCH_CHECK(is_finite(scale), "scale: expected a finite float32");
  STD_TORCH_CHECK(cap >= 0 && is_finite(cap), "soft_cap: expected a positive float32");
  STD_TORCH_CHECK(window >= 0 && (causal || !window), "sliding_window: expected at least 1, with causal");
  p.scale = static_cast<float>(scale);
  p.cap = cap > 0 ? std::max(static_cast<float>(cap), std::numeric_limits<float>::min()) : 0;
  p.causal = causal;
  p.window = window;
  if (sinks) {
    check_dims(*sinks, 1, "sinks");
    p.sinks_dtype = dtype_of(*sinks);
    STD_TORCH_CHECK(is_float(p.sinks_dtype) && sinks->size(0) == p.heads, "sinks: expected one a head");
    p.sinks = sinks->data_ptr();
  }
  set_sequences(p, k_cache, block_tables, seq_lens, query_start_loc, q.size(0));
  set_rows(p, q.size(0), p.v.cols, p.q_dtype);
  return p;
}

Mla mla_of(T q_nope, T q_pe, T kv_cache, T w_uk, T w_uv, T block_tables, T seq_lens, T query_start_loc, double scale,
           OptionalT kv_scale) {
  Mla p;
  Attention& a = p.attention;
  const ScalarType dtype = dtype_of(q_nope);
  STD_TORCH_CHECK(is_float(dtype), "q_nope: expected bfloat16, float16 or float32");
  p.q_nope = heads_of(q_nope, dtype, "q_nope");
  p.q_pe = heads_of(q_pe, dtype, "q_pe");
  a.heads = q_nope.size(1);
  a.kv_heads = 1;
  p.w_uk = weight_of(w_uk, dtype, a.heads, "w_uk");
  p.w_uv = weight_of(w_uv, dtype, a.heads, "w_uv");
  p.rank = w_uk.size(2);
  p.rope = q_pe.size(2);
  STD_TORCH_CHECK(q_pe.size(0) == q_nope.size(0) && q_pe.size(1) == a.heads,
                  "q_pe: expected q_nope's tokens and heads");
  STD_TORCH_CHECK(p.w_uk.rows == q_nope.size(2), "w_uk: expected as many rows as q_nope has columns");
  STD_TORCH_CHECK(w_uv.size(2) == p.rank && p.rank > 0, "w_uv: expected w_uk's columns");
  a.k = a.v = cache_of(kv_cache, 3, kv_scale, dtype, "kv_cache");
  STD_TORCH_CHECK(a.k.cols == p.rank + p.rope, "kv_cache: expected a latent and a rotated key");
  a.v.cols = p.rank;
  STD_TORCH_CHECK(is_finite(scale), "scale: expected a finite float32");
  a.scale = static_cast<float>(scale);
  set_sequences(a, kv_cache, block_tables, seq_lens, query_start_loc, q_nope.size(0));
  set_rows(a, q_nope.size(0), p.w_uv.rows, dtype);
  return p;
}

Attention& attention_in(Attention& p) { return p; }
Attention& attention_in(Mla& p) { return p.attention; }

// Without columns: leading sizes of what is made.
Tensor rows_without_columns(const Attention& p) {
  const int64_t size[2] = {p.out.rows, 0}, stride[2] = {1, 1};
  return empty_strided(2, size, stride, ScalarType::Char, kCpu);
}

// Makes codes of rows of S: a head at a time where no scale is shared by two, otherwise when a row is complete.
template <class Call>
void run_with_codes(Call& call) {
  Attention& p = attention_in(call);
  Pipeline& out = p.out;
  const int64_t cols = out.cols / p.heads;
  p.slices = out.key.is_static() || cols % out.key.group(out.cols) == 0;
  if (!out.data || p.slices) return run_on_cpu(call);
  Pipeline codes = out;
  Tensor rows = rows_without_columns(p);
  if (!out.y) rows = empty_rows(rows, out.cols, out.dtype, out.y);
  out.data = Rows();
  run_on_cpu(call);
  codes.x = out.y;
  codes.y = Rows();
  run_on_cpu(codes);
}

// The overloads of an operation, from the function that checks its arguments.
template <auto MAKE, class... Input>
struct Overloads {
  static Tensor functional(Input... inputs) {
    auto call = MAKE(inputs...);
    Attention& p = attention_in(call);
    Tensor y = empty_rows(rows_without_columns(p), p.out.cols, p.out.dtype, p.out.y);
    run_on_cpu(call);
    return y;
  }

  static void out(Input... inputs, OptionalT y) {
    auto call = MAKE(inputs...);
    Attention& p = attention_in(call);
    if (!y) return;
    p.out.y = rows_like(*y, "y_out", rows_without_columns(p), p.out.cols, p.out.dtype);
    check(p, inputs...);
    run_on_cpu(call);
  }

  static std::tuple<Tensor, Tensor> quantized(Input... inputs, int64_t key, OptionalT given) {
    auto call = MAKE(inputs...);
    Attention& p = attention_in(call);
    set_served_key(p, key, given, {});
    auto made = new_quantized(p.out, rows_without_columns(p));
    run_with_codes(call);
    return made;
  }

  static void quantized_out(Input... inputs, int64_t key, OptionalT given, OptionalT zero_point, OptionalT data,
                            OptionalT scale, OptionalT zero_point_out, OptionalT unquantized) {
    auto call = MAKE(inputs...);
    Attention& p = attention_in(call);
    set_served_key(p, key, given, zero_point);
    set_quantized(p.out, rows_without_columns(p), data, scale, zero_point_out, unquantized);
    check(p, inputs..., given, zero_point);
    run_with_codes(call);
  }

 private:
  static void set_served_key(Attention& p, int64_t key, OptionalT given, OptionalT zero_point) {
    set_key(p.out, key, given, zero_point);
    STD_TORCH_CHECK(p.out.key.is_static() || !p.out.key.per_tensor(),
                    "key: expected static scales, or one a row or group");
  }

  template <class... Argument>
  static void check(const Attention& p, const Argument&... arguments) {
    Memory memory;
    (add_input(memory, arguments), ...);
    add_outputs(memory, p.out);
    memory.check();
  }
  template <class Argument>
  static void add_input(Memory& memory, const Argument& argument) {
    if constexpr (!std::is_arithmetic_v<Argument>) memory.reads(argument, "input");
  }
};

using Paged = Overloads<attention_of, T, T, T, T, T, T, double, bool, int64_t, double, OptionalT, OptionalT, OptionalT>;
using Latent = Overloads<mla_of, T, T, T, T, T, T, T, T, double, OptionalT>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
#define IMPLEMENT(name, Op)                                \
  add_kernel<TORCH_BOX(&Op::functional)>(m, name);         \
  add_kernel<TORCH_BOX(&Op::out)>(m, name ".out");         \
  add_kernel<TORCH_BOX(&Op::quantized)>(m, name "_quant"); \
  add_kernel<TORCH_BOX(&Op::quantized_out)>(m, name "_quant.out")
  IMPLEMENT("paged_attention", Paged);
  IMPLEMENT("mla_attention", Latent);
#undef IMPLEMENT
}

}  // namespace fused_ops
