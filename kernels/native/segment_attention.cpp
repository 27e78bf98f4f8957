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

    // Scales of `count` tokens from slot `first` on, and what is added to a code's multiple; int8 is expanded from 0 on,
    // so it begins at -128 steps. `count` is a tile's at most, `pairs` scratch of twice as many.
    void parameters(int64_t first, int64_t count, float* pairs, float* scales, float* shifts) const {
        if (params == nullptr) {
            std::fill(scales, scales + count, 1.0f);
            std::fill(shifts, shifts + count, 0.0f);
            return;
        }
        const int64_t each = side.bits == 8 ? 1 : 2;
        const uint16_t* own = params + first * side.params_token;
        if (side.params_token == each) {
            int64_t i = 0;
            for (; i + LANES <= each * count; i += LANES) store(pairs + i, load_half(own + i));
            for (; i < each * count; ++i) pairs[i] = half_to_float(own[i]);
        } else {
            for (int64_t i = 0; i < each * count; ++i) pairs[i] = half_to_float(own[i / each * side.params_token + i % each]);
        }
        for (int64_t i = 0; i < count; ++i) {
            scales[i] = pairs[each * i];
            shifts[i] = each == 1 ? -128.0f * pairs[i] : pairs[2 * i + 1];
        }
    }

    // c and mu as floats, [2][width].
    void vectors(int64_t width, float* out) const {
        for (int64_t d = 0; d < width; ++d) {
            out[d] = side.channels == nullptr ? 1.0f : number(side.channels, side.channel_kind, channels + d);
            out[width + d] = side.channels == nullptr ? 0.0f : number(side.channels, side.channel_kind, channels + width + d);
        }
    }
};

// Codes of a token, N to a byte, as floats; the N parts of the channels lie in the N parts of the bits.
template <int BITS>
void expand_codes(const uint8_t* codes, int64_t width, float* out) {
    constexpr int MASK = (1 << BITS) - 1;
    const int64_t part = width * BITS / 8;
    int64_t j = 0;
    for (; j + LANES <= part; j += LANES) {
        const Lanes bytes = widen(codes + j);
        const Lanes mask = all_lanes(MASK);
        store(out + j, floats(both(bytes, mask)));
        store(out + j + part, floats(both(right<BITS>(bytes), mask)));
        if constexpr (BITS == 2) {
            store(out + j + 2 * part, floats(both(right<4>(bytes), mask)));
            store(out + j + 3 * part, floats(right<6>(bytes)));
        }
    }
    for (; j < part; ++j) {
        for (int n = 0; n < 8 / BITS; ++n) out[j + n * part] = static_cast<float>(codes[j] >> (BITS * n) & MASK);
    }
}

void expand_int8(const uint8_t* codes, int64_t width, float* out) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        // -128 .. -1 stand as 128 .. 255, and 0 .. 127 as themselves: turning the eighth bit adds 128 to both
        const Lanes bytes = widen(codes + d);
        const Lanes low = both(bytes, all_lanes(127));
        const Lanes high = both(right<7>(bytes), all_lanes(1));
        store(out + d, add(sub(floats(low), mul(floats(high), all(128.0f))), all(128.0f)));
    }
    for (; d < width; ++d) out[d] = static_cast<float>(codes[d] ^ 0x80u);
}

// Codes of `count` tokens from slot `first` on, as floats [count][width].
void expand(const View& view, int64_t first, int64_t count, int64_t width, float* out) {
    const CompressSide& side = view.side;
    for (int64_t t = 0; t < count; ++t, out += width) {
        const int64_t at = view.index + (first + t) * side.token;
        if (side.bits == 2) {
            expand_codes<2>(view.bytes + at, width, out);
        } else if (side.bits == 4) {
            expand_codes<4>(view.bytes + at, width, out);
        } else if (side.bits == 8) {
            expand_int8(view.bytes + at, width, out);
        } else {
            int64_t d = 0;
            for (; d + LANES <= width; d += LANES) store(out + d, load_kind(side.codes, side.kind, at + d));
            for (; d < width; ++d) out[d] = number(side.codes, side.kind, at + d);
        }
    }
}

// out[r][t] = rows[r] . tile[t] for ROWS rows.
template <int ROWS>
void dots(const float* rows, const float* tile, int64_t tokens, int64_t width, float* out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
        Floats sums[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            for (int i = 0; i < 4; ++i) sums[r][i] = zeros();
        }
        const float* k = tile + t * width;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            Floats q[ROWS];
            for (int r = 0; r < ROWS; ++r) q[r] = load(rows + r * width + d);
            for (int i = 0; i < 4; ++i) {
                const Floats own = load(k + i * width + d);
                for (int r = 0; r < ROWS; ++r) sums[r][i] = fma(q[r], own, sums[r][i]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            float* to = out + r * out_stride + t;
            store_sums(to, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
            for (int64_t e = d; e < width; ++e) {
                for (int i = 0; i < 4; ++i) to[i] += rows[r * width + e] * k[i * width + e];
            }
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

constexpr int WIDE = LANES == 16 ? 4 : 2;  // registers of a row that are summed into at once

// out[r] += sum over tokens of weights[r][t] tile[t], for ROWS rows and N registers of channels.
template <int ROWS, int N>
void weighted_part(const float* weights, int64_t stride, const float* tile, int64_t tokens, int64_t width, float* out) {
    Floats sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < N; ++i) sums[r][i] = load(out + r * width + i * LANES);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        Floats own[N];
        for (int i = 0; i < N; ++i) own[i] = load(tile + t * width + i * LANES);
        for (int r = 0; r < ROWS; ++r) {
            const Floats w = all(weights[r * stride + t]);
            for (int i = 0; i < N; ++i) sums[r][i] = fma(w, own[i], sums[r][i]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < N; ++i) store(out + r * width + i * LANES, sums[r][i]);
    }
}

template <int ROWS>
void weighted(const float* weights, int64_t stride, const float* tile, int64_t tokens, int64_t width, float* out) {
    int64_t d = 0;
    for (; d + WIDE * LANES <= width; d += WIDE * LANES) {
        weighted_part<ROWS, WIDE>(weights, stride, tile + d, tokens, width, out + d);
    }
    for (; d + LANES <= width; d += LANES) weighted_part<ROWS, 1>(weights, stride, tile + d, tokens, width, out + d);
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
        folded_ = buffer(block_ * (width + 3));
        tile_ = buffer(TILE_TOKENS * (width + 4));
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
        float* inverses = folded_.get() + block_ * (width + 2);
        for (int64_t r = 0; r < count; ++r) lse[r] = exponentials(scores_.get() + r * total_, inverses[r]);
        place = 0;
        for (int64_t s = 0; s < call_.count; place += extent(s), ++s) {
            if (extent(s) != 0) mix(call_.segments[s], s, count, scores_.get() + place, out);
        }
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t d = 0; d < width; ++d) out[r * width + d] *= inverses[r];
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
        float* pairs = shifts + TILE_TOKENS;
        for (int64_t t = 0; t < extent(s); t += TILE_TOKENS) {
            const int64_t tokens = std::min(TILE_TOKENS, extent(s) - t);
            const int64_t slot = bounds(s)[0] + t;
            expand(view, slot, tokens, width, tile_.get());
            all_dots(folded_.get(), count, tile_.get(), tokens, width, scores + t, total_);
            view.parameters(slot, tokens, pairs, scales, shifts);
            for (int64_t r = 0; r < count; ++r) {
                float* own = scores + r * total_ + t;
                const Floats sum = all(sums[r]);
                const Floats bias = all(biases[r]);
                int64_t i = 0;
                for (; i + LANES <= tokens; i += LANES) {
                    store(own + i, fma(load(scales + i), load(own + i), fma(load(shifts + i), sum, bias)));
                }
                for (; i < tokens; ++i) own[i] = scales[i] * own[i] + (shifts[i] * sums[r] + biases[r]);
            }
        }
    }

    // e^(score - largest) in the place of a row's scores, and one over their sum; returns the log-sum-exp.
    float exponentials(float* scores, float& inverse) const {
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
        Floats sums = zeros();
        for (i = 0; i + LANES <= total_; i += LANES) sums = add(sums, load(scores + i));
        float total = sum_of(sums);
        for (; i < total_; ++i) total += scores[i];
        inverse = 1.0f / total;
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
        float* pairs = shifts + TILE_TOKENS;
        for (int64_t t = 0; t < extent(s); t += TILE_TOKENS) {
            const int64_t tokens = std::min(TILE_TOKENS, extent(s) - t);
            const int64_t slot = bounds(s)[0] + t;
            expand(view, slot, tokens, width, tile_.get());
            view.parameters(slot, tokens, pairs, scales, shifts);
            for (int64_t r = 0; r < count; ++r) {
                float* own = weights + r * total_ + t;
                Floats share = zeros();
                Floats shift = zeros();
                int64_t i = 0;
                for (; i + LANES <= tokens; i += LANES) {
                    const Floats w = load(own + i);
                    share = add(share, w);
                    shift = fma(w, load(shifts + i), shift);
                    store(own + i, mul(w, load(scales + i)));
                }
                shares[r] += sum_of(share);
                shifted[r] += sum_of(shift);
                for (; i < tokens; ++i) {
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
