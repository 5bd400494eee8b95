// Which of the compiled instruction sets this process uses on the CPU.
//
// Every csrc/<room>/cpu.cpp is compiled once per instruction set with -DDSA_ISA=<name>; its code
// lives in namespace dsa::<name> and only the chosen one registers its ops.
// DSA_CPU_ISA=avx512bf16|avx512|avx2|generic overrides the choice.
#pragma once

#include <cstdlib>
#include <cstring>

namespace dsa {

inline bool cpu_supports_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

inline bool cpu_supports_avx512() {
#if defined(__x86_64__)
    return cpu_supports_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

inline bool cpu_supports_avx512bf16() {
#if defined(__x86_64__)
    return cpu_supports_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

inline const char* cpu_isa() {
    const char* forced = std::getenv("DSA_CPU_ISA");
    const bool any = forced == nullptr || *forced == '\0';
    if ((any || !std::strcmp(forced, "avx512bf16")) && cpu_supports_avx512bf16())
        return "avx512bf16";
    if ((any || !std::strcmp(forced, "avx512")) && cpu_supports_avx512()) return "avx512";
    if ((any || !std::strcmp(forced, "avx2")) && cpu_supports_avx2()) return "avx2";
    return "generic";
}

}  // namespace dsa
