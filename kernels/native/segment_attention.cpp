// Attention over packed segments on a CPU, a tile of tokens after the other, with an online softmax. The codes of a
// tile are expanded once for all query rows of a KV head, to floats without their scales: keys turned, so that scores
// are whole vectors over tokens, values as they lie. Scales, channel vectors and means are folded into queries, weights
// and outputs:
//
//   score_t = s_t (q c_k) . code_t + z_t sum(q c_k) + q . mu_k
//   out     = c_v (sum_t (p_t s_t) code_t + sum_t p_t z_t) + mu_v sum_t p_t

#include "segment_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "buffer.h"
#include "exponential.h"
#include "kv_codes.h"
#include "lanes.h"
#include "product.h"

namespace compress {
namespace {

constexpr int64_t TILE_TOKENS = 64;
constexpr int PARTS = 8;  // partial sums side by side; every width is a multiple of it

void fill(float* out, int64_t count, float value) { std::fill(out, out + count, value); }

// One sequence's and KV head's view of a side.
class View {
   public:
    View(const CompressSide& side, const CompressSegments& call, int64_t b, int64_t h)
        : side_(side),
          first_(b * side.batch + h * side.head),
          params_(side.params == nullptr ? nullptr : side.params + b * side.params_batch + h * side.params_head),
          channels_((b * call.kv_heads + h) * 2 * call.width),
          width_(call.width) {}

    // c and mu, [2][width].
    void channels(float* out) const {
        if (side_.channels == nullptr) {
            fill(out, width_, 1.0f);
            fill(out + width_, width_, 0.0f);
            return;
        }
        int64_t i = 0;
        for (; i + LANES <= 2 * width_; i += LANES) {
            store(out + i, load_kind(side_.channels, side_.channel_kind, channels_ + i));
        }
        for (; i < 2 * width_; ++i) out[i] = number(side_.channels, side_.channel_kind, channels_ + i);
    }

    // s and z of the tokens of a tile; 1 and 0 where tokens have none.
    void scales(int64_t slot, int64_t tokens, float* s, float* z) const {
        if (params_ == nullptr || side_.bits == 8) fill(z, TILE_TOKENS, 0.0f);
        if (params_ == nullptr) {
            fill(s, TILE_TOKENS, 1.0f);
            return;
        }
        const int64_t each = side_.bits == 8 ? 1 : 2;
        uint16_t halves[2 * TILE_TOKENS] = {};
        float floats[2 * TILE_TOKENS];
        const uint16_t* from = params_ + slot * side_.params_token;
        if (side_.params_token == each) {
            std::memcpy(halves, from, static_cast<size_t>(2 * each * tokens));
        } else {
            for (int64_t t = 0; t < tokens; ++t) {
                std::memcpy(halves + each * t, from + t * side_.params_token, static_cast<size_t>(2 * each));
            }
        }
        float* to = each == 1 ? s : floats;
        for (int64_t i = 0; i < each * TILE_TOKENS; i += LANES) store(to + i, load_half(halves + i));
        for (int64_t t = 0; each == 2 && t < TILE_TOKENS; ++t) {
            s[t] = floats[2 * t];
            z[t] = floats[2 * t + 1];
        }
    }

    // Codes [tokens][width].
    void values(int64_t slot, int64_t tokens, float* out, int64_t stride) const {
        for (int64_t t = 0; t < tokens; ++t, out += stride) {
            const int64_t at = first_ + (slot + t) * side_.token;
            const uint8_t* codes = static_cast<const uint8_t*>(side_.codes) + at;
            switch (side_.bits) {
                case 2: straight<2>(codes, width_ / 4, out); break;
                case 4: straight<4>(codes, width_ / 2, out); break;
                case 8: straight<8>(codes, width_, out); break;
                default: floats(at, out);
            }
        }
    }

    // Codes [width][TILE_TOKENS]; what stands behind the last token is finite where all codes are.
    void keys(int64_t slot, int64_t tokens, float* out, float* row) const {
        const int64_t at = first_ + slot * side_.token;
        const uint8_t* codes = static_cast<const uint8_t*>(side_.codes) + at;
        switch (side_.bits) {
            case 2: return turned<2>(codes, side_.token, tokens, width_ / 4, out, TILE_TOKENS);
            case 4: return turned<4>(codes, side_.token, tokens, width_ / 2, out, TILE_TOKENS);
            case 8: return turned<8>(codes, side_.token, tokens, width_, out, TILE_TOKENS);
            default: break;
        }
        for (int64_t t = 0; t < tokens; ++t) {
            floats(at + t * side_.token, row);
            for (int64_t d = 0; d < width_; ++d) out[d * TILE_TOKENS + t] = row[d];
        }
    }

   private:
    void floats(int64_t at, float* out) const {
        int64_t d = 0;
        for (; d + LANES <= width_; d += LANES) store(out + d, load_kind(side_.codes, side_.kind, at + d));
        for (; d < width_; ++d) out[d] = number(side_.codes, side_.kind, at + d);
    }

    const CompressSide& side_;
    const int64_t first_;  // of the first slot, in elements
    const uint16_t* params_;
    const int64_t channels_;
    const int64_t width_;
};

// The work of one KV head of one sequence after the other, all its query rows together.
class Worker {
   public:
    explicit Worker(const CompressSegments& call)
        : call_(call),
          width_(call.width),
          room_((call.width + LANES - 1) / LANES * LANES),
          rows_(call.heads / call.kv_heads * call.rows) {}

    bool ready() const { return ready_; }

    void run(int64_t b, int64_t h) {
        const int64_t first = (b * call_.heads + h * (call_.heads / call_.kv_heads)) * call_.rows;
        float* out = call_.out + first * width_;
        fill(out, rows_ * width_, 0.0f);
        fill(largest_, rows_, -INFINITY);
        fill(total_, rows_, 0.0f);
        for (int64_t s = 0; s < call_.count; ++s) {
            const CompressSegment& segment = call_.segments[s];
            const int32_t* bounds = segment.bounds + (b * call_.kv_heads + h) * 2;
            if (bounds[1] <= bounds[0]) continue;
            const View keys(segment.keys, call_, b, h);
            const View values(segment.values, call_, b, h);
            fold(keys, call_.q + first * width_);
            fill(mixed_, rows_ * room_, 0.0f);
            fill(shares_, rows_, 0.0f);
            fill(shifted_, rows_, 0.0f);
            for (int64_t slot = bounds[0]; slot < bounds[1]; slot += TILE_TOKENS) {
                tile(keys, values, slot, std::min<int64_t>(TILE_TOKENS, bounds[1] - slot), out);
            }
            unfold(values, out);
        }
        for (int64_t r = 0; r < rows_; ++r) {
            call_.lse[first + r] = largest_[r] + std::log(total_[r]);
            if (total_[r] == 0.0f) continue;
            const float inverse = 1.0f / total_[r];
            for (int64_t d = 0; d < width_; ++d) out[r * width_ + d] *= inverse;
        }
    }

   private:
    Buffer own(int64_t floats) {
        Buffer made(floats);
        ready_ = ready_ && made != nullptr;
        return made;
    }

    // Queries times scaling and c, their sums, and what every token's score gets.
    void fold(const View& keys, const float* q) {
        keys.channels(channels_);
        const float* mu = channels_ + width_;
        const float scaling = static_cast<float>(call_.scaling);
        for (int64_t r = 0; r < rows_; ++r) {
            const float* from = q + r * width_;
            float* to = folded_ + r * width_;
            float sums[PARTS] = {};
            float biases[PARTS] = {};
            for (int64_t d = 0; d < width_; d += PARTS) {
                for (int i = 0; i < PARTS; ++i) {
                    const float scaled = from[d + i] * scaling;
                    to[d + i] = scaled * channels_[d + i];
                    sums[i] += to[d + i];
                    biases[i] += scaled * mu[d + i];
                }
            }
            sums_[r] = biases_[r] = 0.0f;
            for (int i = 0; i < PARTS; ++i) {
                sums_[r] += sums[i];
                biases_[r] += biases[i];
            }
        }
    }

    void tile(const View& keys, const View& values, int64_t slot, int64_t tokens, float* out) {
        const int64_t columns = (tokens + LANES - 1) / LANES * LANES;
        keys.scales(slot, tokens, key_scales_, key_zeros_);
        values.scales(slot, tokens, value_scales_, value_zeros_);
        keys.keys(slot, tokens, keys_, row_);
        multiply({folded_, width_}, rows_, {keys_, TILE_TOKENS}, width_, columns, {scores_, TILE_TOKENS}, false);
        for (int64_t r = 0; r < rows_; ++r) weigh(r, tokens, columns, out);
        values.values(slot, tokens, values_, room_);
        multiply({scores_, TILE_TOKENS}, rows_, {values_, room_}, tokens, room_, {mixed_, room_}, true);
    }

    // Products of a row become its weights times s, as far as the largest score till now goes.
    void weigh(int64_t r, int64_t tokens, int64_t columns, float* out) {
        float* scores = scores_ + r * TILE_TOKENS;
        const Floats sum = all(sums_[r]);
        const Floats bias = all(biases_[r]);
        for (int64_t t = 0; t < columns; t += LANES) {
            const Floats added = fma(load(key_zeros_ + t), sum, bias);
            store(scores + t, fma(load(key_scales_ + t), load(scores + t), added));
        }
        for (int64_t t = tokens; t < columns; ++t) scores[t] = -INFINITY;
        Floats highest = load(scores);
        for (int64_t t = LANES; t < columns; t += LANES) highest = larger(highest, load(scores + t));
        const float found = largest_of(highest);
        if (found > largest_[r]) {
            rescale(r, exponential(largest_[r] - found), out);
            largest_[r] = found;
        }
        const float largest = largest_[r];
        for (int64_t t = 0; t < columns; ++t) scores[t] = exponential(scores[t] - largest);
        Floats share = zeros();
        Floats shift = zeros();
        for (int64_t t = 0; t < columns; t += LANES) {
            const Floats weight = load(scores + t);
            share = add(share, weight);
            shift = fma(weight, load(value_zeros_ + t), shift);
            store(scores + t, mul(weight, load(value_scales_ + t)));
        }
        const float own = sum_of(share);
        shares_[r] += own;
        total_[r] += own;
        shifted_[r] += sum_of(shift);
    }

    void rescale(int64_t r, float factor, float* out) {
        total_[r] *= factor;
        shares_[r] *= factor;
        shifted_[r] *= factor;
        for (int64_t d = 0; d < width_; ++d) {
            mixed_[r * room_ + d] *= factor;
            out[r * width_ + d] *= factor;
        }
    }

    // Adds what a segment's values come to.
    void unfold(const View& values, float* out) {
        values.channels(channels_);
        const float* mu = channels_ + width_;
        for (int64_t r = 0; r < rows_; ++r) {
            const float* mixed = mixed_ + r * room_;
            for (int64_t d = 0; d < width_; ++d) {
                out[r * width_ + d] += channels_[d] * (mixed[d] + shifted_[r]) + mu[d] * shares_[r];
            }
        }
    }

    const CompressSegments& call_;
    const int64_t width_;
    const int64_t room_;  // width in whole registers
    const int64_t rows_;  // query rows of a KV head
    bool ready_ = true;   // false when there was no memory
    const Buffer folded_ = own(rows_ * width_);        // [rows][width]: q scaling c_k
    const Buffer sums_ = own(rows_);                   // of the above
    const Buffer biases_ = own(rows_);                 // q scaling mu_k
    const Buffer scores_ = own(rows_ * TILE_TOKENS);   // [rows][TILE_TOKENS], then weights
    const Buffer mixed_ = own(rows_ * room_);          // [rows][room]: sums of weights times codes, of the segment
    const Buffer largest_ = own(rows_);                // scores till now
    const Buffer total_ = own(rows_);                  // weights till now
    const Buffer shares_ = own(rows_);                 // weights of the segment
    const Buffer shifted_ = own(rows_);                // weights times z of the segment
    const Buffer keys_ = own(width_ * TILE_TOKENS);    // codes [width][TILE_TOKENS]
    const Buffer values_ = own(TILE_TOKENS * room_);   // codes [TILE_TOKENS][room]
    const Buffer channels_ = own(2 * width_);          // c and mu of the side in hand
    const Buffer row_ = own(width_);
    const Buffer key_scales_ = own(TILE_TOKENS);       // s and z of a tile's keys and values
    const Buffer key_zeros_ = own(TILE_TOKENS);
    const Buffer value_scales_ = own(TILE_TOKENS);
    const Buffer value_zeros_ = own(TILE_TOKENS);
};

// Every step-th KV head from the first on. False when there is no memory.
bool share(const CompressSegments& call, int64_t first, int64_t step) {
    Worker worker(call);
    if (!worker.ready()) return false;
    for (int64_t i = first; i < call.batch * call.kv_heads; i += step) worker.run(i / call.kv_heads, i % call.kv_heads);
    return true;
}

}  // namespace
}  // namespace compress

extern "C" int64_t compress_segment_attention(const CompressSegments* call) {
    const int64_t shares = std::max<int64_t>(1, std::min(call->threads, call->batch * call->kv_heads));
    std::atomic<bool> done{true};
    const auto part = [call, shares, &done](int64_t i) {
        if (!compress::share(*call, i, shares)) done = false;
    };
    std::vector<std::thread> others;
    int64_t mine = 1;  // this thread's parts
    for (int64_t i = shares - 1; i > 0; --i) {
        try {
            others.emplace_back(part, i);
        } catch (const std::system_error&) {  // no thread to be had: this one does the rest
            mine = i + 1;
            break;
        }
    }
    for (int64_t i = 0; i < mine; ++i) part(i);
    for (std::thread& other : others) other.join();
    return done ? 0 : 1;
}
