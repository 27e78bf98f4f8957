// Codes of a KV cache to floats, as a build's registers like it: straight, a token's channels side by side, or turned,
// a channel's tokens side by side, for which bytes are transposed while they are still packed.
//
// Layout "split halves" (kernels/kv_pack): place p of byte j holds channel j + p * bytes of the token.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace compress {

// The code at a place of the byte that `widen` left in every lane; 8 bits are signed.
template <int BITS, int PLACE>
inline Floats code_at(Lanes byte) {
    if constexpr (PLACE > 0) byte = right<BITS * PLACE>(byte);
    if constexpr (BITS == 8) {  // turning the highest of 8 bits adds 128
        return sub(floats(flipped(byte, all_lanes(0x80))), all(128.0f));
    } else {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        // The table look-up takes 4 low bits of each lane and drops the rest.
        if constexpr (BITS == 4) {
            return _mm512_permutexvar_ps(byte, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        } else {
            return _mm512_permutexvar_ps(byte, _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
        }
#else
        return floats(both(byte, all_lanes((1 << BITS) - 1)));
#endif
    }
}

template <int BITS>
inline float one_code(uint8_t byte, int place) {
    if constexpr (BITS == 8) return static_cast<float>(static_cast<int8_t>(byte));
    return static_cast<float>(byte >> (BITS * place) & ((1 << BITS) - 1));
}

// Calls use(place as a constant) for each place of a byte.
template <int BITS, typename Use>
inline __attribute__((always_inline)) void each_place(Use&& use) {
    use(std::integral_constant<int, 0>());
    if constexpr (BITS <= 4) use(std::integral_constant<int, 1>());
    if constexpr (BITS == 2) {
        use(std::integral_constant<int, 2>());
        use(std::integral_constant<int, 3>());
    }
}

// The codes of one token of `bytes` bytes, out [bytes * 8 / BITS].
template <int BITS>
inline void straight(const uint8_t* codes, int64_t bytes, float* out) {
    if (bytes < LANES) {
        for (int p = 0; p < 8 / BITS; ++p) {
            for (int64_t j = 0; j < bytes; ++j) out[p * bytes + j] = one_code<BITS>(codes[j], p);
        }
        return;
    }
    for (int64_t next = 0; next < bytes; next += LANES) {
        const int64_t j = std::min(next, bytes - LANES);  // the last one overlaps the one before
        const Lanes byte = widen(codes + j);
        each_place<BITS>([&](auto place) __attribute__((always_inline)) {
            store(out + place * bytes + j, code_at<BITS, place>(byte));
        });
    }
}

constexpr int SQUARE = 16;  // tokens and bytes that are transposed at once

// out[j][t] = rows[t][j]
inline void transpose(const uint8_t* const rows[SQUARE], uint8_t out[SQUARE * SQUARE]) {
#if defined(__SSE2__)
    __m128i from[SQUARE];
    __m128i to[SQUARE];
    for (int i = 0; i < SQUARE; ++i) from[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
    for (int step = 0; step < 4; ++step) {  // each turns the bits of a byte's place, row and column, round by one
        for (int i = 0; i < SQUARE / 2; ++i) {
            to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + SQUARE / 2]);
            to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + SQUARE / 2]);
        }
        std::copy(to, to + SQUARE, from);
    }
    for (int i = 0; i < SQUARE; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + SQUARE * i), from[i]);
#else
    for (int t = 0; t < SQUARE; ++t) {
        for (int j = 0; j < SQUARE; ++j) out[SQUARE * j + t] = rows[t][j];
    }
#endif
}

// The codes of `tokens` tokens, `stride` bytes from one to the next, out [bytes * 8 / BITS][out_stride]. Columns up to
// the next multiple of 16 are filled with codes of the last token.
template <int BITS>
inline void turned(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t bytes, float* out,
                   int64_t out_stride) {
    alignas(64) uint8_t square[SQUARE * SQUARE];
    uint8_t narrow[SQUARE][SQUARE] = {};
    const uint8_t* rows[SQUARE];
    const int64_t high = std::min<int64_t>(bytes, SQUARE);
    for (int64_t t = 0; t < tokens; t += SQUARE) {
        for (int64_t next = 0; next < bytes; next += SQUARE) {
            const int64_t j = std::max<int64_t>(0, std::min(next, bytes - SQUARE));
            for (int i = 0; i < SQUARE; ++i) {
                rows[i] = codes + std::min(t + i, tokens - 1) * stride + j;
                if (bytes < SQUARE) {
                    std::memcpy(narrow[i], rows[i], static_cast<size_t>(bytes));
                    rows[i] = narrow[i];
                }
            }
            transpose(rows, square);
            for (int64_t i = 0; i < high; ++i) {
                float* row = out + (j + i) * out_stride + t;
                for (int lane = 0; lane < SQUARE; lane += LANES) {
                    const Lanes byte = widen(square + SQUARE * i + lane);
                    each_place<BITS>([&](auto place) __attribute__((always_inline)) {
                        store(row + place * bytes * out_stride + lane, code_at<BITS, place>(byte));
                    });
                }
            }
        }
    }
}

}  // namespace compress
