// Attention over packed segments on a CPU. Codes of a tile of tokens are expanded once, to floats without their scales,
// for all query rows of a KV head; scales, channel vectors and means are folded into queries, weights and outputs:
//
//   score_t = s_t (q c_k) . code_t + z_t sum(q c_k) + q . mu_k
//   out     = c_v (sum_t (p_t s_t) code_t + sum_t p_t z_t) + mu_v sum_t p_t
//
// The scores of a block of rows over all segments stand in memory, so that the softmax needs no correction later.

#include "segment_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "exponential.h"
#include "lanes.h"

namespace compress {
namespace {

constexpr int64_t TILE_TOKENS = 64;
constexpr int64_t MOST_SCORES = 1 << 18;  // floats of a block of rows: they stay in the second-level cache

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(int64_t values) { return Buffer(static_cast<float*>(std::malloc(static_cast<size_t>(4 * values + 64)))); }

// One sequence's and KV head's view of a side.
struct View {
    const CompressSide& side;
    const uint8_t* bytes;
    int64_t index;  // of the first slot, in elements
    const uint16_t* params;
    int64_t channels;  // index of c; mu is `width` behind it

    View(const CompressSide& from, const CompressSegments& call, int64_t b, int64_t h)
        : side(from),
          bytes(static_cast<const uint8_t*>(from.codes)),
          index(b * from.batch + h * from.head),
          params(from.params == nullptr ? nullptr : from.params + b * from.params_batch + h * from.params_head),
          channels((b * call.kv_heads + h) * 2 * call.width) {}

    float scale(int64_t t) const { return params == nullptr ? 1.0f : half_to_float(params[t * side.params_token]); }

    // What is added to a code's multiple; int8 is expanded from 0 on, so it begins at -128 steps.
    float shift(int64_t t) const {
        if (params == nullptr) return 0.0f;
        return side.bits == 8 ? -128.0f * scale(t) : half_to_float(params[t * side.params_token + 1]);
    }

    // c and mu as floats, [2][width].
    void vectors(int64_t width, float* out) const {
        for (int64_t d = 0; d < width; ++d) {
            out[d] = side.channels == nullptr ? 1.0f : number(side.channels, side.channel_kind, channels + d);
            out[width + d] = side.channels == nullptr ? 0.0f : number(side.channels, side.channel_kind, channels + width + d);
        }
    }
};

void to_floats(const uint8_t* bytes, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, load_bytes(bytes + i));
    for (; i < count; ++i) out[i] = static_cast<float>(bytes[i]);
}

// Codes of `count` tokens from slot `first` on, as floats [count][width]; `bytes` is scratch of width bytes and some more.
void expand(const View& view, int64_t first, int64_t count, int64_t width, uint8_t* bytes, float* out) {
    const CompressSide& side = view.side;
    for (int64_t t = 0; t < count; ++t, out += width) {
        const int64_t at = view.index + (first + t) * side.token;
        if (side.bits == 16) {
            int64_t d = 0;
            for (; d + LANES <= width; d += LANES) store(out + d, load_kind(side.codes, side.kind, at + d));
            for (; d < width; ++d) out[d] = number(side.codes, side.kind, at + d);
            continue;
        }
        const uint8_t* codes = view.bytes + at;
        const int64_t part = width * side.bits / 8;
        if (side.bits == 8) {
            for (int64_t d = 0; d < width; ++d) bytes[d] = codes[d] ^ 0x80u;
        } else if (side.bits == 4) {
            for (int64_t j = 0; j < part; ++j) {
                bytes[j] = codes[j] & 15u;
                bytes[j + part] = codes[j] >> 4;
            }
        } else {
            for (int64_t j = 0; j < part; ++j) {
                bytes[j] = codes[j] & 3u;
                bytes[j + part] = codes[j] >> 2 & 3u;
                bytes[j + 2 * part] = codes[j] >> 4 & 3u;
                bytes[j + 3 * part] = codes[j] >> 6;
            }
        }
        to_floats(bytes, width, out);
    }
}

// dots[r][t] = rows[r] . tile[t] for ROWS rows and two tokens.
template <int ROWS>
void dots(const float* rows, const float* tile, int64_t tokens, int64_t width, float* out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
        Floats sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = zeros();
        const float* a = tile + t * width;
        const float* b = a + width;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const Floats va = load(a + d);
            const Floats vb = load(b + d);
            for (int r = 0; r < ROWS; ++r) {
                const Floats q = load(rows + r * width + d);
                sums[r][0] = fma(q, va, sums[r][0]);
                sums[r][1] = fma(q, vb, sums[r][1]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            float first = sum_of(sums[r][0]);
            float second = sum_of(sums[r][1]);
            for (int64_t e = d; e < width; ++e) {
                first += rows[r * width + e] * a[e];
                second += rows[r * width + e] * b[e];
            }
            out[r * out_stride + t] = first;
            out[r * out_stride + t + 1] = second;
        }
    }
    for (; t < tokens; ++t) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0.0f;
            for (int64_t d = 0; d < width; ++d) sum += rows[r * width + d] * tile[t * width + d];
            out[r * out_stride + t] = sum;
        }
    }
}

// out[r] += sum over tokens of weights[r][t] tile[t], for ROWS rows.
template <int ROWS>
void weighted(const float* weights, int64_t stride, const float* tile, int64_t tokens, int64_t width, float* out) {
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        Floats sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r) {
            sums[r][0] = load(out + r * width + d);
            sums[r][1] = load(out + r * width + d + LANES);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const Floats a = load(tile + t * width + d);
            const Floats b = load(tile + t * width + d + LANES);
            for (int r = 0; r < ROWS; ++r) {
                const Floats w = all(weights[r * stride + t]);
                sums[r][0] = fma(w, a, sums[r][0]);
                sums[r][1] = fma(w, b, sums[r][1]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            store(out + r * width + d, sums[r][0]);
            store(out + r * width + d + LANES, sums[r][1]);
        }
    }
    for (; d < width; ++d) {
        for (int r = 0; r < ROWS; ++r) {
            for (int64_t t = 0; t < tokens; ++t) out[r * width + d] += weights[r * stride + t] * tile[t * width + d];
        }
    }
}

void all_dots(const float* rows, int64_t count, const float* tile, int64_t tokens, int64_t width, float* out,
              int64_t stride) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dots<4>(rows + r * width, tile, tokens, width, out + r * stride, stride);
    if (count - r == 3) dots<3>(rows + r * width, tile, tokens, width, out + r * stride, stride);
    if (count - r == 2) dots<2>(rows + r * width, tile, tokens, width, out + r * stride, stride);
    if (count - r == 1) dots<1>(rows + r * width, tile, tokens, width, out + r * stride, stride);
}

void all_weighted(const float* weights, int64_t count, int64_t stride, const float* tile, int64_t tokens, int64_t width,
                  float* out) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) weighted<4>(weights + r * stride, stride, tile, tokens, width, out + r * width);
    if (count - r == 3) weighted<3>(weights + r * stride, stride, tile, tokens, width, out + r * width);
    if (count - r == 2) weighted<2>(weights + r * stride, stride, tile, tokens, width, out + r * width);
    if (count - r == 1) weighted<1>(weights + r * stride, stride, tile, tokens, width, out + r * width);
}

// The work of one sequence's KV head.
class HeadWork {
   public:
    HeadWork(const CompressSegments& call, int64_t b, int64_t h) : call_(call), b_(b), h_(h) {
        for (int64_t s = 0; s < call.count; ++s) total_ += extent(s);
        rows_ = call.heads / call.kv_heads * call.rows;
        const int64_t fitting = MOST_SCORES / std::max<int64_t>(1, total_) / 4 * 4;
        block_ = std::min(rows_, std::max<int64_t>(4, fitting));
    }

    bool run() {
        const int64_t width = call_.width;
        const int64_t first = (b_ * call_.heads + h_ * (call_.heads / call_.kv_heads)) * call_.rows;
        scores_ = buffer(block_ * total_);
        folded_ = buffer(block_ * (width + 2));
        tile_ = buffer(TILE_TOKENS * (width + 2) + width / 4 + 16);
        part_ = buffer(block_ * width);
        vectors_ = buffer(2 * width);
        if (!scores_ || !folded_ || !tile_ || !part_ || !vectors_) return false;
        for (int64_t r = 0; r < rows_; r += block_) {
            const int64_t count = std::min(block_, rows_ - r);
            attend(call_.q + (first + r) * width, count, call_.out + (first + r) * width, call_.lse + first + r);
        }
        return true;
    }

   private:
    const int32_t* bounds(int64_t s) const { return call_.segments[s].bounds + (b_ * call_.kv_heads + h_) * 2; }
    int64_t extent(int64_t s) const { return std::max(0, bounds(s)[1] - bounds(s)[0]); }

    void attend(const float* q, int64_t count, float* out, float* lse) {
        const int64_t width = call_.width;
        std::fill(out, out + count * width, 0.0f);
        if (total_ == 0) {
            std::fill(lse, lse + count, -INFINITY);
            return;
        }
        int64_t place = 0;
        for (int64_t s = 0; s < call_.count; place += extent(s), ++s) {
            if (extent(s) != 0) score(call_.segments[s], s, q, count, scores_.get() + place);
        }
        for (int64_t r = 0; r < count; ++r) lse[r] = softmax(scores_.get() + r * total_);
        place = 0;
        for (int64_t s = 0; s < call_.count; place += extent(s), ++s) {
            if (extent(s) != 0) mix(call_.segments[s], s, count, scores_.get() + place, out);
        }
    }

    void score(const CompressSegment& segment, int64_t s, const float* q, int64_t count, float* scores) {
        const int64_t width = call_.width;
        const View view(segment.keys, call_, b_, h_);
        const float scaling = static_cast<float>(call_.scaling);
        view.vectors(width, vectors_.get());
        const float* c = vectors_.get();
        const float* mu = c + width;
        float* sums = folded_.get() + block_ * width;
        float* biases = sums + block_;
        for (int64_t r = 0; r < count; ++r) {
            float sum = 0.0f;
            float bias = 0.0f;
            for (int64_t d = 0; d < width; ++d) {
                const float scaled = q[r * width + d] * scaling;
                const float own = scaled * c[d];
                folded_[r * width + d] = own;
                sum += own;
                bias += scaled * mu[d];
            }
            sums[r] = sum;
            biases[r] = bias;
        }
        float* scales = tile_.get() + TILE_TOKENS * width;
        float* shifts = scales + TILE_TOKENS;
        uint8_t* bytes = reinterpret_cast<uint8_t*>(shifts + TILE_TOKENS);
        for (int64_t t = 0; t < extent(s); t += TILE_TOKENS) {
            const int64_t tokens = std::min(TILE_TOKENS, extent(s) - t);
            const int64_t slot = bounds(s)[0] + t;
            expand(view, slot, tokens, width, bytes, tile_.get());
            all_dots(folded_.get(), count, tile_.get(), tokens, width, scores + t, total_);
            if (view.params == nullptr) {
                for (int64_t r = 0; r < count; ++r) {
                    for (int64_t i = 0; i < tokens; ++i) scores[r * total_ + t + i] += biases[r];
                }
                continue;
            }
            for (int64_t i = 0; i < tokens; ++i) {
                scales[i] = view.scale(slot + i);
                shifts[i] = view.shift(slot + i);
            }
            for (int64_t r = 0; r < count; ++r) {
                float* own = scores + r * total_ + t;
                for (int64_t i = 0; i < tokens; ++i) own[i] = scales[i] * own[i] + shifts[i] * sums[r] + biases[r];
            }
        }
    }

    // Weights in the place of a row's scores; returns their log-sum-exp.
    float softmax(float* scores) const {
        constexpr int PARTS = 16;
        float highest[PARTS];
        for (int j = 0; j < PARTS; ++j) highest[j] = scores[0];
        int64_t i = 0;
        for (; i + PARTS <= total_; i += PARTS) {
            for (int j = 0; j < PARTS; ++j) highest[j] = scores[i + j] > highest[j] ? scores[i + j] : highest[j];
        }
        for (; i < total_; ++i) highest[0] = scores[i] > highest[0] ? scores[i] : highest[0];
        const float largest = *std::max_element(highest, highest + PARTS);
        for (i = 0; i < total_; ++i) scores[i] = exponential(scores[i] - largest);
        float sums[PARTS] = {};
        for (i = 0; i + PARTS <= total_; i += PARTS) {
            for (int j = 0; j < PARTS; ++j) sums[j] += scores[i + j];
        }
        float total = 0.0f;
        for (; i < total_; ++i) total += scores[i];
        for (int j = 0; j < PARTS; ++j) total += sums[j];
        const float inverse = 1.0f / total;
        for (i = 0; i < total_; ++i) scores[i] *= inverse;
        return largest + std::log(total);
    }

    void mix(const CompressSegment& segment, int64_t s, int64_t count, float* weights, float* out) {
        const int64_t width = call_.width;
        const View view(segment.values, call_, b_, h_);
        float* shares = folded_.get() + block_ * width;  // sum of p
        float* shifted = shares + block_;                // sum of p z
        std::fill(shares, shares + 2 * block_, 0.0f);
        std::fill(part_.get(), part_.get() + count * width, 0.0f);
        float* scales = tile_.get() + TILE_TOKENS * width;
        float* shifts = scales + TILE_TOKENS;
        uint8_t* bytes = reinterpret_cast<uint8_t*>(shifts + TILE_TOKENS);
        for (int64_t t = 0; t < extent(s); t += TILE_TOKENS) {
            const int64_t tokens = std::min(TILE_TOKENS, extent(s) - t);
            const int64_t slot = bounds(s)[0] + t;
            expand(view, slot, tokens, width, bytes, tile_.get());
            for (int64_t i = 0; i < tokens; ++i) {
                scales[i] = view.scale(slot + i);
                shifts[i] = view.shift(slot + i);
            }
            for (int64_t r = 0; r < count; ++r) {
                float* own = weights + r * total_ + t;
                for (int64_t i = 0; i < tokens; ++i) {
                    shares[r] += own[i];
                    shifted[r] += own[i] * shifts[i];
                    own[i] *= scales[i];
                }
            }
            all_weighted(weights + t, count, total_, tile_.get(), tokens, width, part_.get());
        }
        view.vectors(width, vectors_.get());
        const float* c = vectors_.get();
        const float* mu = c + width;
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t d = 0; d < width; ++d) {
                out[r * width + d] += c[d] * (part_[r * width + d] + shifted[r]) + mu[d] * shares[r];
            }
        }
    }

    const CompressSegments& call_;
    const int64_t b_;
    const int64_t h_;
    int64_t total_ = 0;
    int64_t rows_ = 0;
    int64_t block_ = 0;
    Buffer scores_;  // [block][total]
    Buffer folded_;  // [block][width] q c_k, then two numbers a row
    Buffer tile_;    // [TILE_TOKENS][width], scales, shifts, and bytes
    Buffer part_;    // [block][width]
    Buffer vectors_; // [2][width] c and mu of the side in hand
};

}  // namespace
}  // namespace compress

extern "C" int64_t compress_segment_attention(const CompressSegments* call) {
    const int64_t total = call->batch * call->kv_heads;
    std::atomic<int64_t> failed{0};
    const auto share = [call, total, &failed](int64_t first, int64_t step) {
        for (int64_t i = first; i < total; i += step) {
            compress::HeadWork work(*call, i / call->kv_heads, i % call->kv_heads);
            if (!work.run()) failed = 1;
        }
    };
    const int64_t shares = std::max<int64_t>(1, std::min(call->threads, total));
    std::vector<std::thread> others;
    for (int64_t i = 1; i < shares; ++i) others.emplace_back(share, i, shares);
    share(0, shares);
    for (std::thread& other : others) other.join();
    return failed;
}
