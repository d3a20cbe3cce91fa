#include "row_op.h"

namespace fused_ops {

void implement_rows(const char* dispatch_key) {
  // Kept: a library that is destroyed takes its kernels along.
  auto* const m = new Library(Library::Kind::IMPL, "fused_ops", dispatch_key, __FILE__, __LINE__);
  implement_norms(*m);
  implement_dual_norm(*m);
  implement_activations(*m);
  implement_quantize(*m);
  implement_rope(*m);
  if (std::string(dispatch_key) != "CPU") return;
  implement_collectives(*m);
  implement_gathers(*m);
}

namespace {

[[maybe_unused]] const bool kOnLoad = (implement_rows("CPU"), true);

}  // namespace
}  // namespace fused_ops
