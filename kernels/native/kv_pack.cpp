// Quantize-and-pack of a KV cache on a CPU. A token's channels stand in one row of floats, filled to whole registers.

#include "kv_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "lanes.h"

namespace compress {
namespace {

constexpr float RATIOS[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
constexpr float SMALLEST_SCALE = 0x1p-24f;

struct Range {
    float low;
    float high;
};

// A row of floats in whole registers; what stands behind its last value repeats its first. NaN if one of them is.
Range range_of(const float* y, int64_t room) {
    Floats lows = load(y);
    Floats highs = lows;
    Floats marks = zeros();  // NaN where a value isn't finite: smaller and larger lose it
    for (int64_t i = 0; i < room; i += LANES) {
        const Floats values = load(y + i);
        lows = smaller(values, lows);
        highs = larger(values, highs);
        marks = fma(values, zeros(), marks);
    }
    const bool finite = sum_of(marks) == 0.0f;
    if (!finite && std::any_of(y, y + room, [](float value) { return std::isnan(value); })) return {NAN, NAN};
    return {smallest_of(lows), largest_of(highs)};
}

// To the nearest integer, ties to even, numbers of magnitude below 2^22.
inline Floats nearest(Floats x) { return sub(add(x, all(12582912.0f)), all(12582912.0f)); }

// Clamped before it is rounded: the bounds are integers.
inline Floats code_of(Floats steps, Floats largest) { return nearest(smaller(larger(steps, zeros()), largest)); }

struct Found {
    uint16_t step;
    uint16_t zero;
};

Found params_of(Range range, float largest) {
    const float step = (range.high - range.low) / largest;
    return {float_to_half(step < SMALLEST_SCALE ? SMALLEST_SCALE : step), float_to_half(range.low)};
}

// Squared error of x over a row; c is 0 behind its last value. Codes are found by a product with 1 / step: one that
// this puts on the other side of a tie is as far off.
float squared_error(const float* y, const float* c, int64_t room, Found found, float largest) {
    const Floats step = all(half_to_float(found.step));
    const Floats inverse = all(1.0f / half_to_float(found.step));
    const Floats zero = all(half_to_float(found.zero));
    const Floats most = all(largest);
    Floats total = zeros();
    for (int64_t i = 0; i < room; i += LANES) {
        const Floats shifted = sub(load(y + i), zero);
        const Floats code = code_of(mul(shifted, inverse), most);
        const Floats error = mul(load(c + i), sub(mul(code, step), shifted));
        total = fma(error, error, total);
    }
    return sum_of(total);
}

// Scale and zero point of a row, by the best range.
Found search(const float* y, const float* c, int64_t room, float largest, bool clip) {
    const Range range = range_of(y, room);
    Found best = params_of(range, largest);
    if (!clip) return best;
    float error = squared_error(y, c, room, best, largest);
    const float middle = (range.low + range.high) * 0.5f;
    for (int r = 1; r < 7; ++r) {
        const float reach = (range.high - range.low) * (0.5f * RATIOS[r]);
        const Found found = params_of({middle - reach, middle + reach}, largest);
        const float own = squared_error(y, c, room, found, largest);
        if (own < error) {
            error = own;
            best = found;
        }
    }
    return best;
}

void round_row(const float* y, int64_t room, Found found, float largest, float* codes) {
    const Floats step = all(half_to_float(found.step));
    const Floats zero = all(half_to_float(found.zero));
    for (int64_t i = 0; i < room; i += LANES) {
        store(codes + i, code_of(quotient(sub(load(y + i), zero), step), all(largest)));
    }
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

// 8 bits, symmetric; returns the scale.
uint16_t pack_symmetric(const float* x, int64_t width, int64_t room, float* codes, int8_t* out) {
    const Range range = range_of(x, room);
    const uint16_t scale = float_to_half((range.high > -range.low ? range.high : -range.low) / 127.0f);
    const float step = half_to_float(scale);
    if (step == 0.0f) {
        std::memset(out, 0, static_cast<size_t>(width));
        return scale;
    }
    const Floats least = all(-127.0f);
    for (int64_t i = 0; i < room; i += LANES) {
        store(codes + i, nearest(smaller(larger(quotient(load(x + i), all(step)), least), all(127.0f))));
    }
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<int8_t>(codes[i]);
    return scale;
}

// Rows of scratch for the tokens of a call, and the work on one head of one sequence.
class Packer {
   public:
    explicit Packer(const CompressPack& call)
        : call_(call),
          room_((call.width + LANES - 1) / LANES * LANES),
          largest_(static_cast<float>((1 << call.bits) - 1)) {}

    bool ready() const { return c_ != nullptr && mu_ != nullptr && y_ != nullptr && codes_ != nullptr; }

    void run(int64_t b, int64_t h) {
        channels((b * call_.heads + h) * 2 * call_.width);
        const float* x = call_.x + b * call_.x_batch + h * call_.x_head;
        uint8_t* out = call_.codes + b * call_.codes_batch + h * call_.codes_head;
        uint16_t* params = call_.params;
        if (params != nullptr) params += b * call_.params_batch + h * call_.params_head;
        for (int64_t t = 0; t < call_.tokens; ++t, x += call_.x_token, out += call_.codes_token) {
            token(x, out, params);
            if (params != nullptr) params += call_.params_token;
        }
    }

   private:
    void channels(int64_t first) {
        const int64_t width = call_.width;
        for (int64_t i = 0; i < width; ++i) {
            c_[i] = call_.channels == nullptr ? 1.0f : number(call_.channels, call_.channel_kind, first + i);
            mu_[i] = call_.channels == nullptr ? 0.0f : number(call_.channels, call_.channel_kind, first + width + i);
        }
    }

    void token(const float* x, uint8_t* out, uint16_t* params) {
        const int64_t width = call_.width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(y_ + i, quotient(sub(load(x + i), load(mu_ + i)), load(c_ + i)));
        for (; i < width; ++i) y_[i] = (x[i] - mu_[i]) / c_[i];
        for (; i < room_; ++i) y_[i] = y_[0];
        if (call_.bits == 8) {
            params[0] = pack_symmetric(y_, width, room_, codes_, reinterpret_cast<int8_t*>(out));
            return;
        }
        if (params == nullptr) {
            for (i = 0; i < room_; i += LANES) store(codes_ + i, code_of(load(y_ + i), all(largest_)));
        } else {
            const Found found = search(y_, c_, room_, largest_, call_.clip != 0);
            params[0] = found.step;
            params[1] = found.zero;
            round_row(y_, room_, found, largest_, codes_);
        }
        write_codes(codes_, width, call_.bits, out);
    }

    const CompressPack& call_;
    const int64_t room_;  // width in whole registers
    const float largest_;
    const Buffer c_{room_};
    const Buffer mu_{room_};
    const Buffer y_{room_};  // of the token in hand
    const Buffer codes_{room_};
};

}  // namespace
}  // namespace compress

extern "C" int64_t compress_kv_pack(const CompressPack* call) {
    compress::Packer packer(*call);
    if (!packer.ready()) return 1;
    for (int64_t i = 0; i < call->batch * call->heads; ++i) packer.run(i / call->heads, i % call->heads);
    return 0;
}
