// How kernels reach a CUDA device, without CUDA's headers or libraries at build time.
#pragma once

namespace fused_ops {

struct Driver {
  // Runs a kernel on the device's current stream. Null, or what went wrong.
  const char* (*launch)(int device, void* kernel, unsigned blocks, unsigned threads, void** arguments) = nullptr;
  // Makes the kernel of these stages, or of two choices of them, or says why not. kNotNow where kernels are only being
  // listed, to be compiled together: nothing is to be launched then.
  void (*compile)(const char* stages, const char* stages_of_b, int device, void** kernel,
                  const char** reason) = nullptr;
  bool for_cpu = false;  // tensors on the CPU too, in tests
};

inline void* const kNotNow = reinterpret_cast<void*>(1);

// The process's one. fused_ops/_cuda.py sets it.
extern Driver driver;

}  // namespace fused_ops
