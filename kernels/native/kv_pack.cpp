// Quantize-and-pack of a KV cache on a CPU. A token's channels stand in one row of floats; every loop over them is plain,
// with partial results side by side where a sum or a maximum would keep a compiler from using vectors.

#include "kv_pack.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "lanes.h"

namespace compress {
namespace {

constexpr float RATIOS[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
constexpr float SMALLEST_SCALE = 0x1p-24f;
constexpr int PARTS = 16;  // partial sums

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// To the nearest float16, ties to even.
uint16_t to_half(float value) {
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
}

struct Range {
    float low;
    float high;
};

Range range_of(const float* y, int64_t width) {
    float lows[PARTS];
    float highs[PARTS];
    for (int j = 0; j < PARTS; ++j) lows[j] = highs[j] = y[0];
    int64_t i = 0;
    for (; i + PARTS <= width; i += PARTS) {
        for (int j = 0; j < PARTS; ++j) {
            lows[j] = y[i + j] < lows[j] ? y[i + j] : lows[j];
            highs[j] = y[i + j] > highs[j] ? y[i + j] : highs[j];
        }
    }
    for (; i < width; ++i) {
        lows[0] = y[i] < lows[0] ? y[i] : lows[0];
        highs[0] = y[i] > highs[0] ? y[i] : highs[0];
    }
    Range found = {lows[0], highs[0]};
    for (int j = 1; j < PARTS; ++j) {
        found.low = lows[j] < found.low ? lows[j] : found.low;
        found.high = highs[j] > found.high ? highs[j] : found.high;
    }
    return found;
}

// Rounds to the nearest integer, ties to even, numbers of magnitude below 2^22.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float code_of(float y, float zero, float step, float largest) {
    float v = (y - zero) / step;
    v = v < -1.0f ? -1.0f : v;
    v = v > largest + 1.0f ? largest + 1.0f : v;
    v = nearest(v);
    v = v < 0.0f ? 0.0f : v;
    return v > largest ? largest : v;
}

struct Found {
    uint16_t step;
    uint16_t zero;
};

Found params_of(Range range, float largest) {
    const float step = (range.high - range.low) / largest;
    return {to_half(step < SMALLEST_SCALE ? SMALLEST_SCALE : step), to_half(range.low)};
}

void round_row(const float* y, int64_t width, Found found, float largest, float* codes) {
    const float step = half_to_float(found.step);
    const float zero = half_to_float(found.zero);
    for (int64_t i = 0; i < width; ++i) codes[i] = code_of(y[i], zero, step, largest);
}

float squared_error(const float* y, const float* codes, const float* c, int64_t width, Found found) {
    const float step = half_to_float(found.step);
    const float zero = half_to_float(found.zero);
    float sums[PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS <= width; i += PARTS) {
        for (int j = 0; j < PARTS; ++j) {
            const float e = c[i + j] * (codes[i + j] * step + zero - y[i + j]);
            sums[j] += e * e;
        }
    }
    float total = 0.0f;
    for (; i < width; ++i) {
        const float e = c[i] * (codes[i] * step + zero - y[i]);
        total += e * e;
    }
    for (int j = 0; j < PARTS; ++j) total += sums[j];
    return total;
}

// Codes of a row by the best range; `codes` and `tried` are rows of scratch, the result stands in `codes`.
Found search(const float* y, const float* c, int64_t width, float largest, bool clip, float* codes, float* tried) {
    const Range range = range_of(y, width);
    Found best = params_of(range, largest);
    round_row(y, width, best, largest, codes);
    if (!clip) return best;
    float error = squared_error(y, codes, c, width, best);
    const float middle = (range.low + range.high) * 0.5f;
    for (int r = 1; r < 7; ++r) {
        const float reach = (range.high - range.low) * (0.5f * RATIOS[r]);
        const Found found = params_of({middle - reach, middle + reach}, largest);
        round_row(y, width, found, largest, tried);
        const float own = squared_error(y, tried, c, width, found);
        if (own < error) {
            error = own;
            best = found;
            std::memcpy(codes, tried, static_cast<size_t>(4 * width));
        }
    }
    return best;
}

void write_codes(const float* codes, int64_t width, int64_t bits, uint8_t* out) {
    const int64_t part = width * bits / 8;
    if (bits == 4) {
        for (int64_t j = 0; j < part; ++j) {
            out[j] = static_cast<uint8_t>(static_cast<int32_t>(codes[j]) | static_cast<int32_t>(codes[j + part]) << 4);
        }
        return;
    }
    for (int64_t j = 0; j < part; ++j) {
        out[j] = static_cast<uint8_t>(static_cast<int32_t>(codes[j]) | static_cast<int32_t>(codes[j + part]) << 2 |
                                      static_cast<int32_t>(codes[j + 2 * part]) << 4 |
                                      static_cast<int32_t>(codes[j + 3 * part]) << 6);
    }
}

// 8 bits, symmetric.
void pack_symmetric(const float* x, int64_t width, int8_t* out, uint16_t* params) {
    const Range range = range_of(x, width);
    const float largest = range.high > -range.low ? range.high : -range.low;
    params[0] = to_half(largest / 127.0f);
    const float step = half_to_float(params[0]);
    for (int64_t i = 0; i < width; ++i) {
        float v = step == 0.0f ? 0.0f : x[i] / step;
        v = v < -128.0f ? -128.0f : v;
        v = nearest(v > 128.0f ? 128.0f : v);
        out[i] = static_cast<int8_t>(v < -127.0f ? -127.0f : v > 127.0f ? 127.0f : v);
    }
}

}  // namespace
}  // namespace compress

extern "C" int64_t compress_kv_pack(const CompressPack* call) {
    const int64_t width = call->width;
    const std::unique_ptr<float[], compress::Free> memory(
        static_cast<float*>(std::malloc(static_cast<size_t>(20 * width + 4))));
    if (!memory) return 1;
    float* y = memory.get();
    float* codes = y + width;
    float* tried = codes + width;
    float* c = tried + width;
    float* mu = c + width;
    const float largest = static_cast<float>((1 << call->bits) - 1);
    for (int64_t i = 0; i < width; ++i) {
        c[i] = 1.0f;
        mu[i] = 0.0f;
    }
    for (int64_t b = 0; b < call->batch; ++b) {
        for (int64_t h = 0; h < call->heads; ++h) {
            if (call->channels != nullptr) {
                const int64_t first = (b * call->heads + h) * 2 * width;
                for (int64_t i = 0; i < width; ++i) {
                    c[i] = compress::number(call->channels, call->channel_kind, first + i);
                    mu[i] = compress::number(call->channels, call->channel_kind, first + width + i);
                }
            }
            const float* x = call->x + b * call->x_batch + h * call->x_head;
            uint8_t* out = call->codes + b * call->codes_batch + h * call->codes_head;
            uint16_t* params = call->params == nullptr
                                   ? nullptr
                                   : call->params + b * call->params_batch + h * call->params_head;
            for (int64_t t = 0; t < call->tokens; ++t, x += call->x_token, out += call->codes_token) {
                if (call->bits == 8) {
                    compress::pack_symmetric(x, width, reinterpret_cast<int8_t*>(out), params);
                    params += call->params_token;
                    continue;
                }
                for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mu[i]) / c[i];
                if (params == nullptr) {
                    for (int64_t i = 0; i < width; ++i) codes[i] = compress::code_of(y[i], 0.0f, 1.0f, largest);
                } else {
                    const compress::Found found =
                        compress::search(y, c, width, largest, call->clip != 0, codes, tried);
                    params[0] = found.step;
                    params[1] = found.zero;
                    params += call->params_token;
                }
                compress::write_codes(codes, width, call->bits, out);
            }
        }
    }
    return 0;
}
