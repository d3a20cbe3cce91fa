#include "cuda_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>

#include "row_op.h"

namespace fused_ops {

Driver driver;

namespace {

// What is used of libcuda and libtorch_cuda, both of which the process has loaded by the time there is a CUDA tensor.
struct Api {
  int (*launch_kernel)(void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream,
                       void** arguments, void** extra);
  int (*load_library)(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned);
  int (*get_kernel)(void** kernel, void* library, const char* name);
  int (*get_function)(void** function, void* kernel);
  int (*retain_context)(void** context, int device);
  int (*get_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*error_name)(int error, const char** name);
  int (*current_stream)(int device, void** stream);
  const char* missing = nullptr;

  template <class Function>
  void find(void* library, const char* name, Function& function, const char* otherwise) {
    function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
    if (!function && !missing) missing = otherwise;
  }

  Api() {
    void* const cuda = dlopen("libcuda.so.1", RTLD_LAZY);
    const auto in_driver = [&](const char* name, auto& function) {
      find(cuda, name, function, cuda ? "the driver's libcuda.so.1 is older than CUDA 12" : "there is no libcuda.so.1");
    };
    in_driver("cuLaunchKernel", launch_kernel);
    in_driver("cuLibraryLoadData", load_library);
    in_driver("cuLibraryGetKernel", get_kernel);
    in_driver("cuKernelGetFunction", get_function);
    in_driver("cuDevicePrimaryCtxRetain", retain_context);
    in_driver("cuCtxGetCurrent", get_context);
    in_driver("cuCtxPushCurrent_v2", push_context);
    in_driver("cuCtxPopCurrent_v2", pop_context);
    in_driver("cuGetErrorName", error_name);
    find(dlopen("libtorch_cuda.so", RTLD_LAZY), "aoti_torch_get_current_cuda_stream", current_stream,
         "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  }

  static const Api& get() {
    static const Api api;
    return api;
  }

  const char* text(int error) const {
    const char* name = nullptr;
    if (!error) return nullptr;
    return error_name(error, &name) == 0 && name ? name : "an unknown error of the CUDA driver";
  }
};

// The device's context, which is current while this lives: a thread that has not used CUDA yet has none.
class InContext {
 public:
  InContext(const Api& api, int device) : api_(api) {
    constexpr int kDevices = 64;
    static std::atomic<void*> contexts[kDevices];
    if (device < 0 || device >= kDevices) {
      error = 101;  // CUDA_ERROR_INVALID_DEVICE
      return;
    }
    void* context = contexts[device].load(std::memory_order_acquire);
    if (!context) {  // retained for the life of the process, as torch does
      error = api.retain_context(&context, device);
      if (error) return;
      contexts[device].store(context, std::memory_order_release);
    }
    void* current = nullptr;
    error = api.get_context(&current);
    if (error || current == context) return;
    error = api.push_context(context);
    pushed_ = !error;
  }
  ~InContext() {
    void* context;
    if (pushed_) api_.pop_context(&context);
  }

  int error = 0;

 private:
  const Api& api_;
  bool pushed_ = false;
};

}  // namespace
}  // namespace fused_ops

using namespace fused_ops;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fused_ops_set_cuda_driver(const Driver* chosen) { driver = *chosen; }

EXPORT void fused_ops_implement_rows(const char* dispatch_key) { implement_rows(dispatch_key); }

// Driver::launch on a device.
EXPORT const char* fused_ops_launch(int device, void* kernel, unsigned blocks, unsigned threads, void** arguments) {
  const Api& api = Api::get();
  void* stream = nullptr;
  if (api.missing) return api.missing;
  if (api.current_stream(device, &stream)) return "torch has no current stream for the device";
  const InContext context(api, device);
  if (context.error) return api.text(context.error);
  return api.text(api.launch_kernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr));
}

// The function `kernel` of a cubin, loaded for a device, or null; `error` is what went wrong then.
EXPORT void* fused_ops_load_kernel(const void* cubin, int device, const char** error) {
  const Api& api = Api::get();
  void *library = nullptr, *kernel = nullptr, *function = nullptr;
  *error = api.missing;
  if (*error) return nullptr;
  const InContext context(api, device);
  int code = context.error;
  if (!code) code = api.load_library(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!code) code = api.get_kernel(&kernel, library, "kernel");
  if (!code) code = api.get_function(&function, kernel);  // onto the device now, not in the midst of a graph capture
  *error = api.text(code);
  return code ? nullptr : function;
}
