// How a function becomes a kernel of an operation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fused_ops {

using Library = torch::stable::detail::StableLibrary;

// A boxed function whose errors begin with the operation's name, which a compiled graph doesn't say.
template <void (*BOXED)(StableIValue*, uint64_t, uint64_t)>
struct Kernel {
  static inline const std::string* operation = nullptr;  // kernels are added before strings are constructed

  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    try {
      BOXED(stack, inputs, outputs);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(*operation + ": " + error.what());
    }
  }
};

// overload: as in "rms_norm.out". add_kernel<TORCH_BOX(&function)>(m, "rms_norm")
template <void (*BOXED)(StableIValue*, uint64_t, uint64_t)>
void add_kernel(Library& m, const std::string& overload) {
  if (!Kernel<BOXED>::operation) Kernel<BOXED>::operation = new std::string(overload.substr(0, overload.find('.')));
  m.impl(overload.c_str(), &Kernel<BOXED>::call);
}

}  // namespace fused_ops
