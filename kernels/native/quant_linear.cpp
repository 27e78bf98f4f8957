// Linear layers over packed weights, and over plain ones of 32 or 16 bits: y = x W^T + b.
//
// Made for a few tokens at a time. Each block of 16 rows is gone over once for up to TILE tokens: its codes are taken
// apart in registers, multiplied as integers (int8 activations, exact) or as floats (centred codes, scaled group by
// group), and the scales come in once a group. Weights are read in the order in which they lie.

#include "quant_linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "codes.h"

namespace compress {
namespace {

constexpr int64_t ALIGNMENT = 64;
constexpr int64_t AHEAD = 4096;  // bytes of codes that are asked for before they are used

int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

int64_t chunks_of_group(const CompressLinear& layer) { return (layer.group_size + CHUNK - 1) / CHUNK; }

// x [32] to int8 by its largest magnitude; returns the step. A chunk with a NaN or an infinity becomes NaN.
float quantize_chunk(const float* x, int8_t* codes, int32_t* sum) {
    int32_t largest = 0;  // magnitudes order like their bits
    for (int i = 0; i < CHUNK; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    const bool finite = largest < 0x7f800000;
    const float inverse = finite && largest > 0 ? 1.0f / magnitude * 127.0f : 0.0f;
    int32_t total = 0;
    for (int i = 0; i < CHUNK; ++i) {
        const float shifted = (finite ? x[i] : 0.0f) * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest even
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        const int32_t code = std::clamp(bits - 0x4b400000, -127, 127);
        codes[i] = static_cast<int8_t>(code);
        total += code;
    }
    *sum = total;
    return finite ? magnitude / 127.0f : magnitude - magnitude;
}

// part += sums over `chunks` chunks of centred codes times activations, for the TOKENS tokens of one tile.
template <int BITS, bool INT8, int TOKENS>
inline __attribute__((always_inline)) void add_group(const uint8_t* codes, const Activations& in, int64_t token,
                                                     int64_t chunk, int64_t chunks, Floats part[TOKENS]) {
    for (int64_t c = chunk; c < chunk + chunks; ++c, codes += chunk_bytes(BITS)) {
        const int64_t at = token * in.chunks + c * TOKENS;
        for (int i = 0; i < BITS; ++i) __builtin_prefetch(codes + AHEAD + 64 * i);
        Lanes raw[8];
        if constexpr (INT8) {
            take_apart<BITS>(codes, raw);
            for (int m = 0; m < TOKENS; ++m) {
                const Floats product = dot<BITS>(raw, in.codes + at * CHUNK + 4 * m, 4 * TOKENS, in.sum[at + m]);
                part[m] = fma(product, all(in.scale[at + m]), part[m]);
            }
        } else {
            prepare_floats<BITS>(codes, raw);
            const float* x = in.x + at * CHUNK;
            if constexpr (TOKENS > 1) {
                each_weight<BITS>(raw, [&](Floats w, int k) __attribute__((always_inline)) {
                    for (int m = 0; m < TOKENS; ++m) part[m] = fma(w, all(x[k * TOKENS + m]), part[m]);
                });
            } else {  // four sums side by side, to hide the latency of a multiply-add
                Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
                each_weight<BITS>(raw, [&](Floats w, int k) __attribute__((always_inline)) {
                    sums[k % 4] = fma(w, all(x[k]), sums[k % 4]);
                });
                part[0] = add(part[0], add(add(sums[0], sums[1]), add(sums[2], sums[3])));
            }
        }
    }
}

// LANES rows of one block, for TOKENS tokens. `codes` points at these rows within the block, `at` at their first scale.
template <int BITS, bool INT8, int TOKENS>
void rows_times_tokens(const CompressLinear& layer, const uint8_t* codes, int64_t at, const Activations& in,
                       int64_t token, float* out) {
    const int64_t chunks = chunks_of_group(layer);
    Floats total[TOKENS];
    for (Floats& t : total) t = zeros();
    for (int64_t g = 0; g < in.groups; ++g, codes += chunks * chunk_bytes(BITS), at += BLOCK) {
        Floats part[TOKENS];
        for (Floats& p : part) p = zeros();
        add_group<BITS, INT8, TOKENS>(codes, in, token, g * chunks, chunks, part);
        const Floats scale = load_kind(layer.scale, layer.kind, at);
        if (layer.zero != nullptr) {
            const Floats shift = sub(all(center(BITS)), load_bytes(layer.zero + at));
            for (int m = 0; m < TOKENS; ++m) {
                part[m] = fma(shift, all(in.group_sum[token * in.groups + g * TOKENS + m]), part[m]);
            }
        }
        for (int m = 0; m < TOKENS; ++m) total[m] = fma(part[m], scale, total[m]);
    }
    for (int m = 0; m < TOKENS; ++m) store(out + m * BLOCK, total[m]);
}

template <int BITS, bool INT8>
void block_times_tokens(const CompressLinear& layer, int64_t block, const Activations& in, int64_t token,
                        int64_t tokens, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(layer.codes) + block * in.chunks * chunk_bytes(BITS);
    for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
        const int64_t at = block * in.groups * BLOCK + lane;
        const uint8_t* first = codes + 4 * lane;
        for (int64_t m = 0; m < tokens;) {
            float* to = out + m * BLOCK + lane;
            const int64_t tile = tile_of(tokens - m);
            switch (tile) {
                case 1: rows_times_tokens<BITS, INT8, 1>(layer, first, at, in, token + m, to); break;
                case 4: rows_times_tokens<BITS, INT8, 4>(layer, first, at, in, token + m, to); break;
                default: rows_times_tokens<BITS, INT8, TILE>(layer, first, at, in, token + m, to); break;
            }
            m += tile;
        }
    }
}

// Sums of one token for the rows of one block, to their place in y.
void put_rows(const CompressLinear& layer, int64_t block, const float* sums, float* y) {
    const int64_t row = block * BLOCK;
    const int64_t rows = std::min(BLOCK, layer.rows - row);
    if (layer.bias != nullptr) {
        for (int64_t n = 0; n < rows; ++n) y[row + n] = sums[n] + layer.bias[row + n];
    } else {
        std::memcpy(y + row, sums, static_cast<size_t>(4 * rows));
    }
}

template <int BITS, bool INT8>
void packed_blocks(const CompressLinear& layer, const Activations& in, int64_t first, int64_t last, float* y,
                   int64_t stride) {
    constexpr int64_t AT_ONCE = 32;  // tokens whose activations stay in the nearest caches; whole tiles
    float out[AT_ONCE * BLOCK];
    for (int64_t token = 0; token < in.count; token += AT_ONCE) {
        const int64_t tokens = std::min(AT_ONCE, in.count - token);
        for (int64_t block = first; block < last; ++block) {
            block_times_tokens<BITS, INT8>(layer, block, in, token, tokens, out);
            for (int64_t m = 0; m < tokens; ++m) put_rows(layer, block, out + m * BLOCK, y + (token + m) * stride);
        }
    }
}

// The dequantized weights of one block, out [inputs][stride] with its 16 rows side by side.
template <int BITS>
void expand(const CompressLinear& layer, int64_t block, float* out, int64_t stride) {
    const int64_t by_group = chunks_of_group(layer);
    const int64_t groups = layer.columns / layer.group_size;
    const uint8_t* codes = static_cast<const uint8_t*>(layer.codes) + block * groups * by_group * chunk_bytes(BITS);
    for (int64_t c = 0; c < groups * by_group; ++c, codes += chunk_bytes(BITS)) {
        const int64_t inputs = std::min(CHUNK, layer.group_size - c % by_group * CHUNK);
        for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
            const int64_t at = (block * groups + c / by_group) * BLOCK + lane;
            const Floats scale = load_kind(layer.scale, layer.kind, at);
            const Floats shift = layer.zero != nullptr ? sub(all(center(BITS)), load_bytes(layer.zero + at)) : zeros();
            Lanes raw[8];
            prepare_floats<BITS>(codes + 4 * lane, raw);
            each_weight<BITS>(raw, [&](Floats w, int k) __attribute__((always_inline)) {
                if (k < inputs) store(out + k * stride + lane, mul(add(w, shift), scale));
            });
        }
        out += inputs * stride;
    }
}

void plain_blocks(const CompressLinear& layer, const Activations& in, int64_t first, int64_t last, float* y,
                  int64_t stride) {
    const int64_t columns = layer.columns;
    const int64_t whole = columns / (2 * LANES) * (2 * LANES);
    const int64_t width = layer.kind == COMPRESS_FLOAT32 ? 4 : 2;
    for (int64_t n = first * BLOCK; n < std::min(last * BLOCK, layer.rows); ++n) {
        const char* row = static_cast<const char*>(layer.codes) + n * columns * width;
        for (int64_t m = 0; m < in.count; ++m) {
            const float* x = in.plain + m * columns;
            Floats even = zeros();
            Floats odd = zeros();
            for (int64_t k = 0; k < whole; k += 2 * LANES) {
                even = fma(load_kind(row, layer.kind, k), load(x + k), even);
                odd = fma(load_kind(row, layer.kind, k + LANES), load(x + k + LANES), odd);
            }
            float total = sum_of(add(even, odd));
            for (int64_t k = whole; k < columns; ++k) total += number(row, layer.kind, k) * x[k];
            y[m * stride + n] = total + (layer.bias != nullptr ? layer.bias[n] : 0.0f);
        }
    }
}

template <int BITS>
void packed(const CompressLinear& layer, const Activations& in, int64_t first, int64_t last, float* y, int64_t stride) {
    return in.int8 ? packed_blocks<BITS, true>(layer, in, first, last, y, stride)
                   : packed_blocks<BITS, false>(layer, in, first, last, y, stride);
}

void blocks(const CompressLinear& layer, const Activations& in, int64_t first, int64_t last, float* y, int64_t stride) {
    switch (layer.bits) {
        case 2: return packed<2>(layer, in, first, last, y, stride);
        case 3: return packed<3>(layer, in, first, last, y, stride);
        case 4: return packed<4>(layer, in, first, last, y, stride);
        case 8: return packed<8>(layer, in, first, last, y, stride);
        default: return plain_blocks(layer, in, first, last, y, stride);
    }
}

}  // namespace

Activations::~Activations() { std::free(memory_); }

bool Activations::shared(const CompressLinear& layer, const CompressLinear& other) {
    return layer.columns == other.columns && layer.group_size == other.group_size && (layer.bits == 0) == (other.bits == 0) &&
           (layer.zero == nullptr) == (other.zero == nullptr);
}

bool Activations::allocate(bool packed) {
    std::free(memory_);
    memory_ = nullptr;
    if (!packed) return true;
    int64_t tokens = 0;
    while (tokens < count) tokens += tile_of(count - tokens);
    const int64_t values = tokens * chunks * CHUNK;
    const int64_t first = aligned(int8 ? values : 4 * values);
    const int64_t by_chunk = int8 ? aligned(4 * tokens * chunks) : 0;
    const int64_t bytes = first + 2 * by_chunk + aligned(4 * tokens * groups);
    memory_ = std::aligned_alloc(ALIGNMENT, static_cast<size_t>(bytes));
    if (memory_ == nullptr) return false;
    char* at = static_cast<char*>(memory_);
    x = int8 ? nullptr : reinterpret_cast<float*>(at);
    codes = int8 ? reinterpret_cast<int8_t*>(at) : nullptr;
    scale = reinterpret_cast<float*>(at + first);
    sum = reinterpret_cast<int32_t*>(at + first + by_chunk);
    group_sum = reinterpret_cast<float*>(at + first + 2 * by_chunk);
    std::memset(group_sum, 0, static_cast<size_t>(4 * tokens * groups));
    if (int8 && tokens > count) std::memset(memory_, 0, static_cast<size_t>(first + 2 * by_chunk));
    return true;
}

bool Activations::prepare(const CompressLinear& layer, const float* from, int64_t tokens, int64_t activations) {
    count = tokens;
    plain = from;
    const bool packed = layer.bits != 0;
    int8 = packed && activations == COMPRESS_ACTIVATIONS_INT8;
    const int64_t by_group = packed ? chunks_of_group(layer) : 0;
    groups = packed ? layer.columns / layer.group_size : 0;
    chunks = groups * by_group;
    if (!allocate(packed)) return false;
    for (int64_t token = 0; packed && token < count;) {
        const int64_t tile = tile_of(count - token);
        fill_tile(layer, token, tile);
        token += tile;
    }
    return true;
}

void Activations::fill_tile(const CompressLinear& layer, int64_t token, int64_t tokens) {
    const int64_t by_group = chunks_of_group(layer);
    const int64_t real = std::min(tokens, count - token);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = c / by_group * layer.group_size + c % by_group * CHUNK;
        const int64_t inputs = std::min(CHUNK, layer.group_size - c % by_group * CHUNK);
        const int64_t at = token * chunks + c * tokens;
        float values[TILE][CHUNK] = {};
        for (int64_t m = 0; m < real; ++m) {
            std::memcpy(values[m], plain + (token + m) * layer.columns + first, static_cast<size_t>(4 * inputs));
        }
        if (int8) {
            for (int64_t m = 0; m < real; ++m) {
                int8_t rounded[CHUNK];
                scale[at + m] = quantize_chunk(values[m], rounded, sum + at + m);
                for (int64_t j = 0; j < 8; ++j) std::memcpy(codes + at * CHUNK + 4 * (j * tokens + m), rounded + 4 * j, 4);
            }
        } else if (tokens == TILE) {
            for (int64_t k = 0; k < CHUNK; ++k) {
                for (int64_t m = 0; m < TILE; ++m) x[at * CHUNK + k * TILE + m] = values[m][k];
            }
        } else {
            for (int64_t k = 0; k < CHUNK; ++k) {
                for (int64_t m = 0; m < tokens; ++m) x[at * CHUNK + k * tokens + m] = values[m][k];
            }
        }
        if (layer.zero != nullptr) {
            for (int64_t m = 0; m < real; ++m) {
                Floats run = zeros();
                for (int64_t k = 0; k < CHUNK; k += LANES) run = add(run, load(values[m] + k));
                group_sum[token * groups + c / by_group * tokens + m] +=
                    int8 ? scale[at + m] * static_cast<float>(sum[at + m]) : sum_of(run);
            }
        }
    }
}

void apply(const CompressLinear& layer, const Activations& input, float* y, int64_t stride, int64_t threads) {
    const int64_t total = (layer.rows + BLOCK - 1) / BLOCK;
    const int64_t shares = std::max<int64_t>(1, std::min(threads, total));
    std::vector<std::thread> others;
    int64_t mine = total;
    for (int64_t i = shares - 1; i > 0; --i) {
        const int64_t first = total * i / shares;
        try {
            others.emplace_back([&layer, &input, y, stride, first, mine] { blocks(layer, input, first, mine, y, stride); });
        } catch (const std::system_error&) {  // no thread to be had: this one does the rest
            break;
        }
        mine = first;
    }
    blocks(layer, input, 0, mine, y, stride);
    for (std::thread& other : others) other.join();
}

}  // namespace compress

extern "C" {

int64_t compress_quant_linear(const CompressLinear* layer, const float* x, float* y, int64_t count, int64_t activations,
                              int64_t threads) {
    compress::Activations input;
    if (!input.prepare(*layer, x, count, activations)) return 1;
    compress::apply(*layer, input, y, layer->rows, threads);
    return 0;
}

void compress_expand(const CompressLinear* layer, int64_t first, int64_t last, float* out) {
    const int64_t stride = (last - first) * compress::BLOCK;
    for (int64_t block = first; block < last; ++block, out += compress::BLOCK) {
        switch (layer->bits) {
            case 2: compress::expand<2>(*layer, block, out, stride); break;
            case 3: compress::expand<3>(*layer, block, out, stride); break;
            case 4: compress::expand<4>(*layer, block, out, stride); break;
            default: compress::expand<8>(*layer, block, out, stride);
        }
    }
}

}  // extern "C"
