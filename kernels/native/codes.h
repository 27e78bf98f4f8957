// Codes of one chunk (32 inputs) of LANES rows: taken apart, and multiplied by activations.
//
// Every step is exact in integers or a single rounding, so all builds agree. Codes are centred on 2^(bits-1), the zero
// point of symmetric layers: sums of products stay small then, and lose nothing to cancellation.

#pragma once

#include <utility>

#include "lanes.h"

namespace compress {

constexpr int center(int bits) { return 1 << (bits - 1); }

inline int32_t four(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    return bytes;
}

// Bytes of one chunk of a block of 16 rows.
constexpr int64_t chunk_bytes(int bits) { return 64 * bits; }

// The 8 bytes-of-4 of a chunk, plain codes 0 .. 2^bits - 1. `p` points at this register's rows within the block.
template <int BITS>
inline void take_apart(const uint8_t* p, Lanes code[8]) {
    if constexpr (BITS == 8) {
        for (int j = 0; j < 8; ++j) code[j] = load_lanes(p + 64 * j);
    } else if constexpr (BITS == 4) {
        const Lanes low = all_lanes(0x0f0f0f0f);
        for (int i = 0; i < 4; ++i) {
            const Lanes v = load_lanes(p + 64 * i);
            code[2 * i] = both(v, low);
            code[2 * i + 1] = both(right<4>(v), low);
        }
    } else {
        const Lanes low = all_lanes(0x03030303);
        for (int i = 0; i < 2; ++i) {
            const Lanes v = load_lanes(p + 64 * i);
            code[4 * i] = both(v, low);
            code[4 * i + 1] = both(right<2>(v), low);
            code[4 * i + 2] = both(right<4>(v), low);
            code[4 * i + 3] = both(right<6>(v), low);
        }
        if constexpr (BITS == 3) {
            const Lanes high = load_lanes(p + 128);
            const Lanes third = all_lanes(0x04040404);
            code[0] = either(code[0], both(left<2>(high), third));
            code[1] = either(code[1], both(left<1>(high), third));
            code[2] = either(code[2], both(high, third));
            code[3] = either(code[3], both(right<1>(high), third));
            code[4] = either(code[4], both(right<2>(high), third));
            code[5] = either(code[5], both(right<3>(high), third));
            code[6] = either(code[6], both(right<4>(high), third));
            code[7] = either(code[7], both(right<5>(high), third));
        }
    }
}

// Centred code of input 4 J + B of the chunk, from what `prepare_floats` left.
template <int BITS, int J, int B>
inline Floats weight(const Lanes raw[8]);

// Calls use(weight, k) for each of the 32 inputs of the chunk.
template <int BITS, typename Use, int... K>
inline __attribute__((always_inline)) void each_weight(const Lanes raw[8], Use&& use, std::integer_sequence<int, K...>) {
    (use(weight<BITS, K / 4, K % 4>(raw), K), ...);
}
template <int BITS, typename Use>
inline __attribute__((always_inline)) void each_weight(const Lanes raw[8], Use&& use) {
    each_weight<BITS>(raw, use, std::make_integer_sequence<int, 32>());
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// What `weight` reads: registers from which a shift brings a code to the low 4 bits (8 bits: centred bytes).
template <int BITS>
inline void prepare_floats(const uint8_t* p, Lanes raw[8]) {
    if constexpr (BITS == 8) {
        for (int j = 0; j < 8; ++j) raw[j] = _mm512_xor_si512(load_lanes(p + 64 * j), all_lanes(0x80808080));
    } else if constexpr (BITS == 3) {
        take_apart<3>(p, raw);
    } else {
        for (int i = 0; i < BITS; ++i) raw[i] = load_lanes(p + 64 * i);
    }
}

// The table look-up takes 4 low bits of each lane and drops the rest.
template <int BITS, int J, int B>
inline Floats weight(const Lanes raw[8]) {
    if constexpr (BITS == 8) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw[J], 24 - 8 * B), 24));
    } else if constexpr (BITS == 4) {
        const Floats table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(right<8 * B + 4 * (J % 2)>(raw[J / 2]), table);
    } else if constexpr (BITS == 3) {
        const Floats table = _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3);
        return _mm512_permutexvar_ps(right<8 * B>(raw[J]), table);
    } else {
        const Floats table = _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
        return _mm512_permutexvar_ps(right<8 * B + 2 * (J % 4)>(raw[J / 4]), table);
    }
}

// Sums over the chunk of centred codes times int8 activations, whose sum is `sum`: input 4 j + b is x[j * stride + b].
template <int BITS>
inline Floats dot(const Lanes code[8], const int8_t* x, int stride, int32_t sum) {
    Lanes even = all_lanes(-center(BITS) * sum);
    Lanes odd = _mm512_setzero_si512();
    for (int j = 0; j < 8; j += 2) {
        even = _mm512_dpbusd_epi32(even, code[j], all_lanes(four(x + j * stride)));
        odd = _mm512_dpbusd_epi32(odd, code[j + 1], all_lanes(four(x + (j + 1) * stride)));
    }
    return _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
}

#elif defined(__AVX2__)

template <int BITS>
inline void prepare_floats(const uint8_t* p, Lanes raw[8]) {
    take_apart<BITS>(p, raw);
    const Lanes middle = _mm256_set1_epi8(static_cast<char>(center(BITS)));
    for (int j = 0; j < 8; ++j) raw[j] = _mm256_sub_epi8(raw[j], middle);
}

template <int BITS, int J, int B>
inline Floats weight(const Lanes raw[8]) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(raw[J], 24 - 8 * B), 24));
}

template <int BITS>
inline Floats dot(const Lanes code[8], const int8_t* x, int stride, int32_t sum) {
    const Lanes ones = _mm256_set1_epi16(1);
    Lanes total = _mm256_setzero_si256();
    if constexpr (BITS == 8) {
        // A pair of products of plain 8-bit codes doesn't fit 16 bits; of centred ones, as magnitude and sign, it does.
        for (int j = 0; j < 8; ++j) {
            const Lanes centred = _mm256_xor_si256(code[j], _mm256_set1_epi8(static_cast<char>(0x80)));
            const Lanes inputs = all_lanes(four(x + j * stride));
            const Lanes pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(inputs, centred));
            total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
        }
        return _mm256_cvtepi32_ps(total);
    }
    for (int j = 0; j < 8; ++j) {  // 8 pairs of products of at most 15 * 127 each: 30480, fits 16 bits
        total = _mm256_add_epi16(total, _mm256_maddubs_epi16(code[j], all_lanes(four(x + j * stride))));
    }
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(total, ones), all_lanes(center(BITS) * sum)));
}

#else

template <int BITS>
inline void prepare_floats(const uint8_t* p, Lanes raw[8]) {
    take_apart<BITS>(p, raw);
}

template <int BITS, int J, int B>
inline Floats weight(const Lanes raw[8]) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    const Signed code = (Signed)(right<8 * B>(raw[J]) & 0xffu);
    return __builtin_convertvector(code - center(BITS), Floats);
}

// In floats, and exact all the same: no sum reaches 2^24.
template <int BITS>
inline Floats dot(const Lanes code[8], const int8_t* x, int stride, int32_t) {
    Floats total = zeros();
    each_weight<BITS>(code, [&](Floats w, int k) { total = fma(w, all(static_cast<float>(x[k / 4 * stride + k % 4])), total); });
    return total;
}

#endif

}  // namespace compress
