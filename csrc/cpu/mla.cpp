#include "../attention.h"
namespace fused_ops { void run_on_cpu(Mla&) { STD_TORCH_CHECK(false, "todo"); } }
