// `dsa_kernels._C`: what this build contains, for dsa_kernels/native.py. Nothing here is needed to
// run an op.
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <string>

#include "common/isa.h"

namespace {

const char* kPtxasReport =
#include "ptxas_report.inc"
    ;

std::string demangle(const std::string& name) {
    int status = 0;
    char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string result = status == 0 ? text : name;
    std::free(text);
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Introspection of the compiled libraries.";
    m.def("build_info", [] {
        return std::map<std::string, std::string>{
            {"compiler", __VERSION__},
            {"nvcc", DSA_NVCC_VERSION},
            {"cuda_archs", DSA_NVCC_VERSION[0] ? DSA_CUDA_ARCHS : ""},
            {"cpu_isas", DSA_ISAS},
            {"cpu_isa", dsa::cpu_isa()},
        };
    });
    m.def(
        "ptxas_report", [] { return std::string(kPtxasReport); },
        "What `ptxas -v` said of every CUDA kernel when the library was built.");
    m.def("demangle", &demangle, "The C++ name of a symbol.");
}
