// Defines the ops of the CUDA library. The kernels register themselves in csrc/<room>/sm90.cu.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(dsa_kernels_cuda, m) {
    for (const char* schema : dsa::kSchemas) m.def(schema);
}
