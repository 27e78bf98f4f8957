// One register of the build in hand, seen as LANES output rows: floats, or 32 bits that hold 4 codes each.
//
// The three builds differ here alone: AVX-512 with VNNI, AVX2, and GCC's vector extensions for anything else. Codes are
// taken apart into 8 `Lanes` (one for every 4 inputs of a chunk of 32), which then go into byte dot products or, one
// byte at a time, into floats.

#pragma once

#include <cstdint>
#include <cstring>

#include "quant_linear.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace compress {

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    float value;
    if (rest >= 0x7c00u) {
        const uint32_t bits = 0x7f800000u | (rest & 0x3ffu) << 13;
        std::memcpy(&value, &bits, 4);
    } else if (rest >= 0x400u) {
        const uint32_t bits = (rest << 13) + (112u << 23);
        std::memcpy(&value, &bits, 4);
    } else {
        value = static_cast<float>(rest) * 0x1p-24f;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

// To the nearest float16, ties to even.
inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;
    if (bits < 0x38800000u) {  // below the smallest normal float16: 2^-24 is its unit
        float small;
        std::memcpy(&small, &bits, 4);
        const float rounded = small + 0.5f;  // the unit of floats near 0.5 is 2^-24
        std::memcpy(&bits, &rounded, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | (bits - 0x38000000u) >> 13);
#endif
}

inline float bfloat_to_float(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int LANES = 16;
constexpr int TILE = 8;  // tokens handled at once

using Floats = __m512;
using Lanes = __m512i;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats quotient(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Floats load_bfloat(const void* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Lanes widen(const uint8_t* p) {  // LANES bytes, each in a lane
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats floats(Lanes v) { return _mm512_cvtepi32_ps(v); }
inline Lanes load_lanes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Lanes all_lanes(int32_t value) { return _mm512_set1_epi32(value); }
inline Lanes both(Lanes a, Lanes b) { return _mm512_and_si512(a, b); }
inline Lanes either(Lanes a, Lanes b) { return _mm512_or_si512(a, b); }
inline Lanes flipped(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
template <int N>
inline Lanes right(Lanes v) {
    return _mm512_srli_epi32(v, N);
}
template <int N>
inline Lanes left(Lanes v) {
    return _mm512_slli_epi32(v, N);
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
constexpr int TILE = 4;

using Floats = __m256;
using Lanes = __m256i;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats quotient(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Floats load_bfloat(const void* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats load_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Lanes widen(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Floats floats(Lanes v) { return _mm256_cvtepi32_ps(v); }
inline Lanes load_lanes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Lanes all_lanes(int32_t value) { return _mm256_set1_epi32(value); }
inline Lanes both(Lanes a, Lanes b) { return _mm256_and_si256(a, b); }
inline Lanes either(Lanes a, Lanes b) { return _mm256_or_si256(a, b); }
inline Lanes flipped(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
template <int N>
inline Lanes right(Lanes v) {
    return _mm256_srli_epi32(v, N);
}
template <int N>
inline Lanes left(Lanes v) {
    return _mm256_slli_epi32(v, N);
}

#else

constexpr int LANES = 4;
constexpr int TILE = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Lanes __attribute__((vector_size(16)));

inline Floats all(float value) { return Floats{value, value, value, value}; }
inline Floats zeros() { return all(0.0f); }
inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats quotient(Floats a, Floats b) { return a / b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats load_half(const void* p) {
    uint16_t h[4];
    std::memcpy(h, p, sizeof h);
    return Floats{half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])};
}
inline Floats load_bfloat(const void* p) {
    uint16_t h[4];
    std::memcpy(h, p, sizeof h);
    return Floats{bfloat_to_float(h[0]), bfloat_to_float(h[1]), bfloat_to_float(h[2]), bfloat_to_float(h[3])};
}
inline Floats load_bytes(const uint8_t* p) {
    return Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

inline Lanes widen(const uint8_t* p) { return Lanes{p[0], p[1], p[2], p[3]}; }
inline Floats floats(Lanes v) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    return __builtin_convertvector((Signed)v, Floats);
}
inline Lanes load_lanes(const uint8_t* p) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {  // byte b of a row is bits 8 b on, whatever the machine's order of bytes
        words[i] = p[4 * i] | static_cast<uint32_t>(p[4 * i + 1]) << 8 | static_cast<uint32_t>(p[4 * i + 2]) << 16 |
                   static_cast<uint32_t>(p[4 * i + 3]) << 24;
    }
    return Lanes{words[0], words[1], words[2], words[3]};
}
inline Lanes all_lanes(int32_t value) {
    const uint32_t v = static_cast<uint32_t>(value);
    return Lanes{v, v, v, v};
}
inline Lanes both(Lanes a, Lanes b) { return a & b; }
inline Lanes either(Lanes a, Lanes b) { return a | b; }
inline Lanes flipped(Lanes a, Lanes b) { return a ^ b; }
template <int N>
inline Lanes right(Lanes v) {
    return v >> N;
}
template <int N>
inline Lanes left(Lanes v) {
    return v << N;
}

#endif

// Tokens of the next tile when `left` tokens are left; the last tile may be larger than that, and is filled with zeros.
inline int64_t tile_of(int64_t left) {
    return left == 1 ? 1 : left <= 4 ? 4 : TILE;
}

inline Floats load_kind(const void* p, int64_t kind, int64_t index) {
    if (kind == COMPRESS_FLOAT16) return load_half(static_cast<const uint16_t*>(p) + index);
    if (kind == COMPRESS_BFLOAT16) return load_bfloat(static_cast<const uint16_t*>(p) + index);
    return load(static_cast<const float*>(p) + index);
}

inline float number(const void* p, int64_t kind, int64_t index) {
    if (kind == COMPRESS_FLOAT16) return half_to_float(static_cast<const uint16_t*>(p)[index]);
    if (kind == COMPRESS_BFLOAT16) return bfloat_to_float(static_cast<const uint16_t*>(p)[index]);
    return static_cast<const float*>(p)[index];
}

inline float sum_of(Floats v) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float largest_of(Floats v) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    const float even = v[0] > v[2] ? v[0] : v[2];
    const float odd = v[1] > v[3] ? v[1] : v[3];
    return even > odd ? even : odd;
#endif
}

inline float smallest_of(Floats v) { return -largest_of(sub(zeros(), v)); }

}  // namespace compress
