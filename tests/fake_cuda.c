/* Stands for libcuda and libtorch_cuda where there is no GPU: writes down what it is asked for.
 *
 * With FOR_CUDA_PYTHON cuda.core can launch by it. It is left out elsewhere: NVRTC crashes on a driver that lacks most.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static char calls[4096];
static int current, fail;

#define SAY(...) snprintf(calls + strlen(calls), sizeof(calls) - strlen(calls), __VA_ARGS__)

const char* fake_calls(void) { return calls; }
void fake_reset(int next_error) {
  calls[0] = 0;
  fail = next_error;
}
void fake_set_context(int device) { current = device + 1; }

static void* context_of(int device) { return (void*)(size_t)(device + 1); }

int cuDevicePrimaryCtxRetain(void** context, int device) {
  SAY("retain %d;", device);
  *context = context_of(device);
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = (void*)(size_t)current;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  SAY("push %zu;", (size_t)context - 1);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  (void)context;
  SAY("pop;");
  return 0;
}
int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  SAY("load %d;", !memcmp(code, "\x7f" "ELF", 4));
  *library = calls;
  return fail;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  (void)library;
  SAY("get %s;", name);
  *kernel = (void*)16;
  return 0;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = (char*)kernel + 1;
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
  return *name ? 0 : 1;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  (void)extra;
  SAY("launch %zu %u %u %u %u %u %u %u stream %zu rows %lld;", (size_t)function, x, y, z, threads, b, c, shared,
      (size_t)stream, *(long long*)arguments[0]);
  return fail;
}
int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = (void*)(size_t)(1000 + device);
  return 0;
}

#ifdef FOR_CUDA_PYTHON
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
};

int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = current - 1;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = (int)(size_t)context;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return 0;
}
int cuLibraryUnload(void* library) {
  (void)library;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 9;
  return 0;
}
int cuLaunchKernelEx(const struct Config* config, void* kernel, void** arguments, void** extra) {
  return cuLaunchKernel(kernel, config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1],
                        config->block[2], config->shared, config->stream, arguments + 3, extra);
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  void* const here = dlopen("libcuda.so.1", RTLD_LAZY);
  char with_version[128];
  (void)version, (void)flags;
  snprintf(with_version, sizeof(with_version), "%s_v2", name);
  *function = dlsym(here, with_version);
  if (!*function) *function = dlsym(here, name);
  if (status) *status = !*function;
  return *function ? 0 : 500;
}
#endif
