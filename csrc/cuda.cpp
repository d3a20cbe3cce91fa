// Row pipelines on a CUDA device: which kernel, with which arguments, on which stream.
//
// Kernels are compiled by Python (fused_ops/_cuda.py) when they are first asked for.
#include "cuda.h"

#include <cstdio>

namespace fused_ops {

int threads_of(int64_t packs) {
  int threads = 1;
  while (threads < cuda::kMaxThreads && packs > threads * (threads < 256 ? 2 : 4)) threads *= 2;
  return threads;
}

void check_served(int64_t cols) {
  constexpr int64_t kMost = 1 << 29;  // so that columns of gate and up, interleaved, are ints
  STD_TORCH_CHECK(cols <= kMost, "the cuda backend serves rows of up to ", kMost, " columns, got ", cols);
}

cuda::Dtype dtype_of_stage(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? cuda::kBf16 : dtype == ScalarType::Half ? cuda::kFp16 : cuda::kFp32;
}

cuda::Strided strided(const Rows& rows) {
  cuda::Strided out = {};
  out.data = rows.data;
  out.dims = rows.dims;
  for (int d = 0; d < std::max(rows.dims, 1); ++d) {
    out.size[d] = d < rows.dims ? rows.size[d] : 1;
    out.stride[d] = rows.stride[d];
  }
  return out;
}

cuda::ScalePlace place(const ScaleOut& out) { return {out.data, out.row_bytes, out.four, out.one}; }

cuda::Row arguments_of(const Pipeline& p) {
  cuda::Row row = {};
  row.rows = p.rows;
  row.x = strided(p.x);
  row.other = strided(p.other);
  row.sum = strided(p.sum);
  row.y = strided(p.y);
  row.data = strided(p.data);
  row.post_weight = p.post.weight;
  row.weight = p.norm.weight;
  row.bias = p.norm.bias;
  row.post_eps = p.post.eps;
  row.eps = p.norm.eps;
  row.x_multiplier = p.x_multiplier;
  row.alpha = p.alpha;
  row.limit = p.limit;
  row.tokens_per_expert = p.tokens_per_expert;
  row.rows_per_expert = p.rows_per_expert;
  row.given = p.given;
  row.given_zero = p.given_zero;
  row.scale = place(p.scale);
  row.zero_point = place(p.zero_point);
  row.tensor_amax = p.tensor_amax;
  return row;
}

void set_stage(cuda::NormStage& stage, const Norm& norm) {
  stage.kind = static_cast<cuda::NormKind>(norm.kind);
  if (norm.weight) stage.weight = dtype_of_stage(norm.weight_dtype);
  if (norm.bias) stage.bias = dtype_of_stage(norm.bias_dtype);
  stage.round_before_weight = norm.round_before_weight && norm.weight;
  stage.weight_plus_one = norm.weight_plus_one && norm.weight;
}

std::string norm_text(const cuda::NormStage& n) {
  char text[96];
  std::snprintf(text, sizeof(text), "{(NormKind)%d, (Dtype)%d, (Dtype)%d, %d, %d}", n.kind, n.weight, n.bias,
                n.round_before_weight, n.weight_plus_one);
  return text;
}

bool aligned_like(const void* vector, ScalarType vector_dtype, ScalarType dtype) {
  return aligned(vector, std::min<int64_t>(16, pack_of(dtype) * byte_size(vector_dtype)));
}

void* compiled(const std::string& stages, const std::string* stages_of_b, int device) {
  STD_TORCH_CHECK(driver.compile, "there is no CUDA driver on this machine");
  void* kernel = nullptr;
  const char* reason = "Python was interrupted";
  driver.compile(stages.c_str(), stages_of_b ? stages_of_b->c_str() : nullptr, device, &kernel, &reason);
  if (!kernel) throw std::runtime_error(std::string("fused_ops: a kernel could not be compiled: ") + reason);
  return kernel == kNotNow ? nullptr : kernel;
}

void launch_kernel(void* kernel, int device, int64_t blocks, int threads, void** arguments) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "too many rows for one launch");
  if (!kernel) return;
  const char* const error = driver.launch(device, kernel, static_cast<unsigned>(blocks), threads, arguments);
  if (error) throw std::runtime_error(std::string("fused_ops: a kernel could not be launched: ") + error);
}

void set_stages(cuda::Stages& s, const Pipeline& p, bool by_tensor_amax) {
  check_served(p.cols);
  s.dtype = dtype_of_stage(p.dtype);
  s.cols = static_cast<int>(p.cols);
  s.threads = threads_of(packs_of(p.cols, p.dtype));
  s.block = std::max(s.threads, 128);
  s.load = static_cast<cuda::Load>(p.load);
  s.multiplied = p.x_multiplier != 1.0f;
  s.round_activation = p.round_activation;
  s.interleaved = p.load == Pipeline::kSwigluOai && !p.other;
  s.expert_bytes = !p.tokens_per_expert ? 0 : p.long_tokens ? 8 : 4;
  set_stage(s.post, p.post);
  set_stage(s.norm, p.norm);
  s.sum = static_cast<bool>(p.sum);
  s.y = static_cast<bool>(p.y);
  s.data = static_cast<bool>(p.data);
  s.scale = static_cast<bool>(p.scale);
  s.zero_point = static_cast<bool>(p.zero_point);
  s.y_cols = p.y ? static_cast<int>(p.y.cols) : 0;
  s.key = s.data || s.scale ? p.key.code : 0;
  s.collect_amax = p.tensor_amax && !by_tensor_amax;
  s.by_tensor_amax = by_tensor_amax;

  s.flat = true;
  for (const Rows* rows : {&p.x, &p.other, &p.sum, &p.y, &p.data}) s.flat = s.flat && rows->dims <= 1;
  const auto vector = [&](const void* data, ScalarType dtype) { return aligned_like(data, dtype, p.dtype); };
  const int64_t pack = pack_of(p.dtype);
  s.aligned = p.cols % pack == 0 && aligned(p.x, 16) && aligned(p.other, 16) && aligned(p.sum, 16) &&
              aligned(p.y, 16) && aligned(p.data, pack / p.key.codes_per_byte()) &&
              vector(p.norm.weight, p.norm.weight_dtype) && vector(p.norm.bias, p.norm.bias_dtype) &&
              vector(p.post.weight, p.post.weight_dtype);
}

std::string text_of(const cuda::Stages& s) {
  char text[512];
  std::snprintf(
      text, sizeof(text),
      "{(Dtype)%d, %d, %d, %d, %d, %d, (Load)%d, %d, %d, %d, %d, %s, %s, %d, %d, %d, %d, %d, %d, %lld, %d, %d}",
      s.dtype, s.cols, s.threads, s.block, s.aligned, s.flat, s.load, s.multiplied, s.round_activation, s.interleaved,
      s.expert_bytes, norm_text(s.post).c_str(), norm_text(s.norm).c_str(), s.sum, s.y, s.data, s.scale, s.zero_point,
      s.y_cols, s.key, s.collect_amax, s.by_tensor_amax);
  return text;
}

namespace {

struct Choice {
  cuda::Stages a, b;
  int device;
};
Kernels<Choice> kernels;

// Rows that a layout completes its last unit of 128 with are written too, with zeros, and so is a scale that is the
// tensor's where there are no rows.
int64_t blocks_of(const Pipeline& p, const cuda::Stages& s) {
  const int64_t rows = p.scale.swizzled ? (p.rows + 127) / 128 * 128 : p.rows;
  const int64_t per_block = s.block / s.threads, least = p.scale && (s.by_tensor_amax || p.key.is_static());
  return std::max((rows + per_block - 1) / per_block, least);
}

void launch(const Pipeline& a, const Pipeline* b = nullptr, bool by_tensor_amax = false) {
  Choice choice;
  std::memset(&choice, 0, sizeof(choice));
  set_stages(choice.a, a, by_tensor_amax);
  choice.device = a.x.device;
  int64_t blocks_of_a = blocks_of(a, choice.a), blocks = blocks_of_a;
  cuda::Row rows[2] = {arguments_of(a), {}};
  if (b) {
    set_stages(choice.b, *b, false);
    choice.a.block = choice.b.block = std::max(choice.a.block, choice.b.block);
    blocks_of_a = blocks_of(a, choice.a);
    blocks = blocks_of_a + blocks_of(*b, choice.b);
    rows[1] = arguments_of(*b);
  }
  if (!blocks) return;
  void* const kernel = kernels.get(choice, [&] {
    const std::string of_b = b ? text_of(choice.b) : "";
    return compiled(text_of(choice.a), b ? &of_b : nullptr, choice.device);
  });
  void* arguments[] = {&rows[0], &rows[1], &blocks_of_a};
  launch_kernel(kernel, choice.device, blocks, choice.a.block, arguments);
}

// One scale for the whole tensor takes two launches: the rows and their largest element, then the codes.
void launch_per_tensor(Pipeline& p) {
  const int64_t one = 1;
  Tensor amax = empty_strided(1, &one, &one, ScalarType::Int, p.x.device), workspace;
  torch::stable::zero_(amax);
  Pipeline rows = p;
  rows.data = Rows();
  rows.scale = ScaleOut();
  rows.tensor_amax = static_cast<int*>(amax.data_ptr());
  if (!quantizes_x(p) && !p.y) {
    const int64_t size[] = {p.rows, p.cols}, stride[] = {p.cols, 1};
    workspace = empty_strided(2, size, stride, p.dtype, p.x.device);
    rows.y = rows_of(workspace, "workspace");
  }
  launch(rows);

  Pipeline codes = codes_of(p, quantizes_x(p) ? p.x : rows.y);
  codes.scale = p.scale;
  codes.given = p.given;
  codes.tensor_amax = rows.tensor_amax;
  launch(codes, nullptr, true);
}

}  // namespace

bool on_cuda(int device) { return device != kCpu || driver.for_cpu; }

void run_on_cuda(Pipeline& a, Pipeline* b) {
  if (one_scale(a)) return launch_per_tensor(a);
  launch(a, b);
}

}  // namespace fused_ops
