// What a call reads and writes.
#pragma once

#include "common.h"

namespace fused_ops {

// Outputs must not share memory with each other, nor with what is read, unless in its very place.
class Memory {
 public:
  void reads(const OptionalTensor& tensor, const char* name) {
    if (tensor) add(*tensor, name, nullptr, false);
  }
  void writes(const Tensor& tensor, const char* name, const Tensor* in_place_of = nullptr) {
    add(tensor, name, in_place_of, true);
  }

  void check() const {
    for (int i = 0; i < count_; ++i) {
      const Named& out = named_[i];
      if (!out.written) continue;
      check_output(out.rows, out.bytes, out.name);
      for (int j = 0; j < count_; ++j) {
        const Named& other = named_[j];
        if (i == j || (other.written && j < i)) continue;
        check_overlap(out.rows, out.bytes, other.rows, other.bytes, other.rows.data == out.in_place_of, out.name);
      }
    }
  }

 private:
  struct Named {
    Rows rows;
    int64_t bytes;
    const char *name, *in_place_of;
    bool written;
  };

  void add(const Tensor& tensor, const char* name, const Tensor* in_place_of, bool written) {
    STD_TORCH_CHECK(count_ < kMost, "too many tensors");
    const char* const data = in_place_of ? static_cast<const char*>(in_place_of->data_ptr()) : nullptr;
    named_[count_++] = {rows_of(tensor, name), static_cast<int64_t>(tensor.element_size()), name, data, written};
  }

  static constexpr int kMost = 24;
  Named named_[kMost];
  int count_ = 0;
};

}  // namespace fused_ops
