// Tensors of int32 or int64 that say where something lies.
#pragma once

#include "../common.h"

namespace fused_ops {

struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t count = 0;

  Integers() = default;
  Integers(const Tensor& tensor, const char* name) {
    const ScalarType dtype = dtype_of(tensor);
    STD_TORCH_CHECK(tensor.is_cpu() && (dtype == ScalarType::Int || dtype == ScalarType::Long), name,
                    ": expected int32 or int64 on the CPU");
    rows_of(tensor, name);  // for empty ones too
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected contiguous memory");
    data = tensor.data_ptr();
    wide = dtype == ScalarType::Long;
    count = tensor.numel();
  }

  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  // Throws unless each is at least 0 and below `end`.
  void check_below(int64_t end, const char* name) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t value = (*this)[i];
      STD_TORCH_CHECK(end > 0, name, ": has ", value, ", expected none, as there are no rows");
      STD_TORCH_CHECK(value >= 0 && value < end, name, ": has ", value, ", expected 0 to ", end - 1);
    }
  }
};

}  // namespace fused_ops
