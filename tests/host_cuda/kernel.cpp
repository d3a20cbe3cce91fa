// One kernel for the host: KERNEL is the text that NVRTC gets. `launch` has the signature of cuLaunchKernel.
#include <algorithm>
#include <cmath>

#include "fibers.h"

#include KERNEL

namespace {
unsigned seed = 0;
}

extern "C" int launch(void*, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned shared,
                      void*, void** arguments, void**) {
  fibers::launch([](void* a) { call(kernel, (void**)a); }, arguments, blocks, threads, shared, ++seed);
  return 0;
}
