// What a call reads and writes.
#pragma once

#include "common.h"

namespace fused_ops {

// Outputs must not share memory with each other, nor with what is read, unless in its very place.
class Memory {
 public:
  void reads(const Tensor& tensor, const char* name) { add(tensor, name, nullptr, false); }
  void reads(const OptionalTensor& tensor, const char* name) {
    if (tensor) reads(*tensor, name);
  }
  void reads(const Rows& rows, int64_t bytes, const char* name) { put({rows, bytes, name, nullptr, nullptr, false}); }
  // `in_place_of`: the argument, named before, that may be the output; no other that begins where it does may.
  void writes(const Tensor& tensor, const char* name, const Tensor* in_place_of = nullptr) {
    add(tensor, name, in_place_of, true);
  }
  void writes(const Rows& rows, int64_t bytes, const char* name) { put({rows, bytes, name, nullptr, nullptr, true}); }

  void check() const {
    for (int i = 0; i < count_; ++i) {
      const Named& out = named_[i];
      if (!out.written) continue;
      check_output(out.rows, out.bytes, out.name);
      for (int j = 0; j < count_; ++j) {
        const Named& other = named_[j];
        if (i == j || (other.written && j < i)) continue;
        check_overlap(out.rows, out.bytes, other.rows, other.bytes,
                      out.in_place_of && other.argument == out.in_place_of, out.name);
      }
    }
  }

 private:
  struct Named {
    Rows rows;
    int64_t bytes;
    const char* name;
    const Tensor *argument, *in_place_of;
    bool written;
  };

  void add(const Tensor& tensor, const char* name, const Tensor* in_place_of, bool written) {
    const int64_t bytes = static_cast<int64_t>(tensor.element_size());
    put({rows_of(tensor, name), bytes, name, &tensor, in_place_of, written});
  }
  void put(const Named& named) {
    STD_TORCH_CHECK(count_ < kMost, "too many tensors");
    named_[count_++] = named;
  }

  static constexpr int kMost = 24;
  Named named_[kMost];
  int count_ = 0;
};

}  // namespace fused_ops
