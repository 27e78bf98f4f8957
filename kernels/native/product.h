// A small product of matrices in registers, for operands that lie in the nearest caches.

#pragma once

#include <algorithm>

#include "lanes.h"

namespace compress {

// Rows of floats, `stride` from one to the next.
template <typename Float>
struct Rows {
    Float* at;
    int64_t stride;
};

// Rows, and registers of a row, that are summed at once: enough sums to hide a multiply-add's latency, few enough to
// stay in registers.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int64_t TALL = 4;
constexpr int64_t WIDE = 4;
#elif defined(__AVX2__)
constexpr int64_t TALL = 3;
constexpr int64_t WIDE = 4;
#else
constexpr int64_t TALL = 4;
constexpr int64_t WIDE = 2;
#endif

// c [ROWS][VECTORS * LANES] (+)= a [ROWS][depth] b [depth][VECTORS * LANES]
template <int ROWS, int VECTORS>
void multiply_block(Rows<const float> a, Rows<const float> b, int64_t depth, Rows<float> c, bool onto) {
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = onto ? load(c.at + r * c.stride + v * LANES) : zeros();
    }
    for (int64_t k = 0; k < depth; ++k) {
        Floats factors[ROWS];
        for (int r = 0; r < ROWS; ++r) factors[r] = all(a.at[r * a.stride + k]);
        for (int v = 0; v < VECTORS; ++v) {
            const Floats row = load(b.at + k * b.stride + v * LANES);
            for (int r = 0; r < ROWS; ++r) sums[r][v] = fma(factors[r], row, sums[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(c.at + r * c.stride + v * LANES, sums[r][v]);
    }
}

template <int VECTORS>
void multiply_panel(Rows<const float> a, int64_t rows, Rows<const float> b, int64_t depth, Rows<float> c, bool onto) {
    int64_t r = 0;
    const auto from = [&] { return Rows<const float>{a.at + r * a.stride, a.stride}; };
    const auto to = [&] { return Rows<float>{c.at + r * c.stride, c.stride}; };
    for (; r + TALL <= rows; r += TALL) multiply_block<TALL, VECTORS>(from(), b, depth, to(), onto);
    switch (rows - r) {
        case 1: return multiply_block<1, VECTORS>(from(), b, depth, to(), onto);
        case 2: return multiply_block<2, VECTORS>(from(), b, depth, to(), onto);
        case 3: return multiply_block<3, VECTORS>(from(), b, depth, to(), onto);
        default: return;
    }
}

// c [rows][columns] (+)= a [rows][depth] b [depth][columns]; columns a multiple of LANES.
inline void multiply(Rows<const float> a, int64_t rows, Rows<const float> b, int64_t depth, int64_t columns,
                     Rows<float> c, bool onto) {
    for (int64_t n = 0; n < columns; n += WIDE * LANES) {
        const Rows<const float> panel{b.at + n, b.stride};
        const Rows<float> to{c.at + n, c.stride};
        switch (std::min(WIDE, (columns - n) / LANES)) {
            case 1: multiply_panel<1>(a, rows, panel, depth, to, onto); break;
            case 2: multiply_panel<2>(a, rows, panel, depth, to, onto); break;
            case 3: multiply_panel<WIDE == 4 ? 3 : 1>(a, rows, panel, depth, to, onto); break;
            default: multiply_panel<WIDE>(a, rows, panel, depth, to, onto);
        }
    }
}

}  // namespace compress
