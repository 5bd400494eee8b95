// `dsa_kernels._C`: what this build contains. Nothing here is needed to run an op.
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <variant>
#include <vector>

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

using Kernel = std::map<std::string, std::variant<std::string, int64_t>>;

// One entry per CUDA kernel and architecture, read from what `ptxas -v` said when the library was
// built.
std::vector<Kernel> kernel_resources() {
    static const std::regex entry("Compiling entry function '([^']+)' for '([^']+)'");
    static const std::regex frame(
        R"((\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads)");
    static const std::regex used(R"(Used (\d+) registers)");
    static const std::regex smem(R"((\d+) bytes smem)");
    std::vector<Kernel> kernels;
    std::istringstream lines(kPtxasReport);
    std::smatch m;
    for (std::string line; std::getline(lines, line);) {
        if (std::regex_search(line, m, entry)) {
            kernels.push_back(
                {{"name", demangle(m[1])}, {"arch", m[2].str()}, {"shared_bytes", int64_t{0}}});
        } else if (kernels.empty()) {
            continue;
        } else if (std::regex_search(line, m, frame)) {
            kernels.back()["stack_bytes"] = std::stoll(m[1]);
            kernels.back()["spill_store_bytes"] = std::stoll(m[2]);
            kernels.back()["spill_load_bytes"] = std::stoll(m[3]);
        } else if (std::regex_search(line, m, used)) {
            kernels.back()["registers"] = std::stoll(m[1]);
            if (std::regex_search(line, m, smem)) kernels.back()["shared_bytes"] = std::stoll(m[1]);
        }
    }
    return kernels;
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
    m.def("kernel_resources", &kernel_resources,
          "Registers, stack, spill and static shared-memory bytes of each CUDA kernel, as ptxas "
          "reported them.");
}
