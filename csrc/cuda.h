// What launches of CUDA kernels share, of rows (cuda.cpp) and of heads (cuda_rope.cpp).
#pragma once

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "cuda/stages.h"
#include "cuda_driver.h"
#include "row.h"

namespace fused_ops {

// Elements of 16 bytes, and such packs in a row.
inline int64_t pack_of(ScalarType dtype) { return 16 / byte_size(dtype); }
inline int64_t packs_of(int64_t cols, ScalarType dtype) { return (cols + pack_of(dtype) - 1) / pack_of(dtype); }

// Threads that own a row of so many packs. They fix the order of sums, so nothing else may decide them.
int threads_of(int64_t packs);
// Refuses rows that have more columns than kernels count.
void check_served(int64_t cols);

cuda::Dtype dtype_of_stage(ScalarType dtype);
void set_stage(cuda::NormStage& stage, const Norm& norm);
std::string norm_text(const cuda::NormStage& stage);
cuda::Strided strided(const Rows& rows);
cuda::ScalePlace place(const ScaleOut& out);
cuda::Row arguments_of(const Pipeline& p);
// s is all zeros, padding too, since its bytes are a key.
void set_stages(cuda::Stages& s, const Pipeline& p, bool by_tensor_amax = false);
// As NVRTC reads them.
std::string text_of(const cuda::Stages& s);

// Whether packs of a row of `dtype` have their like in a vector of another one.
bool aligned_like(const void* vector, ScalarType vector_dtype, ScalarType dtype);

// The kernel of these stages, compiled by Python; null where it isn't to be launched.
void* compiled(const std::string& stages, const std::string* stages_of_b, int device);
// Nothing where there is no kernel.
void launch_kernel(void* kernel, int device, int64_t blocks, int threads, void** arguments);

// Kernels by what they are compiled for: a Choice has a device, and all of its bytes count, padding too.
template <class Choice>
class Kernels {
 public:
  // `compile` makes one that isn't known yet.
  template <class Compile>
  void* get(const Choice& choice, const Compile& compile) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = known_.find(choice);
      if (found != known_.end()) return found->second;
    }
    void* const kernel = compile();  // without the lock, since Python may switch threads there
    if (!kernel) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    return known_.emplace(choice, kernel).first->second;
  }

 private:
  static std::string_view bytes(const Choice& choice) {
    return {reinterpret_cast<const char*>(&choice), sizeof(choice)};
  }
  struct Hash {
    size_t operator()(const Choice& choice) const { return std::hash<std::string_view>()(bytes(choice)); }
  };
  struct Same {
    bool operator()(const Choice& a, const Choice& b) const { return bytes(a) == bytes(b); }
  };
  std::unordered_map<Choice, void*, Hash, Same> known_;
  std::mutex mutex_;
};

}  // namespace fused_ops
