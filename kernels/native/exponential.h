// e^x in plain arithmetic, so that loops over it become vector code in every build.

#pragma once

#include <cstdint>
#include <cstring>

namespace compress {

// e^x to 2 units in the last place; 0 below -87, and NaN stays NaN.
inline float exponential(float x) {
    const float capped = x > 88.0f ? 88.0f : x;
    const float clipped = capped < -87.0f ? -87.0f : capped;
    const float whole = clipped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    const float n = whole - 12582912.0f;
    const float r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &whole, 4);
    const uint32_t power = static_cast<uint32_t>(bits - 0x4b400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace compress
