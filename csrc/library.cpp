// Defines the public ops and those of the CPU library. The CPU kernels register themselves in
// csrc/<room>/cpu.cpp.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(dsa_kernels, m) {
    for (const char* schema : dsa::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY(dsa_kernels_cpu, m) {
    for (const char* schema : dsa::kSchemas) m.def(schema);
}
