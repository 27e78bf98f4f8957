// Which of the builds this processor can run. Only the portable build is ever asked.

#include <cstdint>

extern "C" {

// 0: nothing beyond the baseline; 1: AVX2 with FMA and F16C; 2: AVX-512 (F, BW, DQ, VL) with VNNI.
int64_t compress_cpu_level() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    return avx2 ? (avx512 ? 2 : 1) : 0;
#else
    return 0;
#endif
}

}  // extern "C"
