// The parts of a decoder layer around its attention, and attention of one query token, in fp32.
//
// What isn't written in registers (lanes.h) are plain loops that a compiler turns into vector code in every build.

#include "block.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "exponential.h"
#include "lanes.h"

namespace compress {
namespace {

float dot_product(const float* a, const float* b, int64_t size) {
    Floats even = zeros();
    Floats odd = zeros();
    const int64_t whole = size / (2 * LANES) * (2 * LANES);
    for (int64_t i = 0; i < whole; i += 2 * LANES) {
        even = fma(load(a + i), load(b + i), even);
        odd = fma(load(a + i + LANES), load(b + i + LANES), odd);
    }
    float total = sum_of(add(even, odd));
    for (int64_t i = whole; i < size; ++i) total += a[i] * b[i];
    return total;
}

void rms_norm(const float* x, const float* weight, double epsilon, int64_t size, float* y) {
    const float mean = dot_product(x, x, size) / static_cast<float>(size);
    const float inverse = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
    for (int64_t i = 0; i < size; ++i) y[i] = x[i] * inverse * weight[i];
}

void rotate(float* head, const float* cos, const float* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i];
        const float high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

void norm_and_rotate(const CompressBlock& block, float* heads, int64_t number, const float* norm, const float* cos,
                     const float* sin) {
    for (int64_t h = 0; h < number; ++h) {
        float* head = heads + h * block.head_dim;
        if (norm != nullptr) rms_norm(head, norm, block.epsilon, block.head_dim, head);
        rotate(head, cos, sin, block.rotary_dim);
    }
}

// gate = act(gate) * up
void gated(float* gate, const float* up, int64_t size, int64_t act) {
    if (act == COMPRESS_SILU) {
        for (int64_t i = 0; i < size; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        return;
    }
    for (int64_t i = 0; i < size; ++i) {  // x (1 + tanh z) / 2 = x / (1 + e^(-2 z))
        const float x = gate[i];
        const float z = 0.7978845608f * (x + 0.044715f * x * x * x);
        gate[i] = x / (1.0f + exponential(-2.0f * z)) * up[i];
    }
}

// The layers that read one input share its prepared form as long as they can.
struct Step {
    const CompressLinear* layer;
    float* y;
};

bool run(const Step* steps, int count, const float* x, int64_t tokens, int64_t activations, int64_t threads) {
    Activations input;
    for (int i = 0; i < count; ++i) {
        const CompressLinear& layer = *steps[i].layer;
        const bool ready = i > 0 && Activations::shared(layer, *steps[i - 1].layer);
        if (!ready && !input.prepare(layer, x, tokens, activations)) return false;
        apply(layer, input, steps[i].y, layer.rows, threads);
    }
    return true;
}

bool normed(const Step* steps, int count, const float* x, const float* norm, double epsilon, int64_t tokens,
            int64_t activations, int64_t threads) {
    const int64_t columns = steps[0].layer->columns;
    const Buffer y(tokens * columns);
    if (y == nullptr) return false;
    for (int64_t m = 0; m < tokens; ++m) rms_norm(x + m * columns, norm, epsilon, columns, y + m * columns);
    return run(steps, count, y, tokens, activations, threads);
}

void add_to(float* x, const float* y, int64_t size) {
    for (int64_t i = 0; i < size; ++i) x[i] += y[i];
}

// scores [tokens]: q k + mask, for one head of one sequence. Returns the largest.
float score(const CompressAttention& call, int64_t b, const float* q, const float* k, float* scores) {
    const float scaling = static_cast<float>(call.scaling);
    const uint8_t* kept = static_cast<const uint8_t*>(call.mask) + b * call.mask_batch;
    const float* added = static_cast<const float*>(call.mask) + b * call.mask_batch;
    float largest = -INFINITY;
    for (int64_t t = 0; t < call.tokens; ++t) {
        float s = scaling * dot_product(q, k + t * call.k_token, call.head_dim);
        if (call.mask_kind == COMPRESS_MASK_FLOAT) s += added[t];
        if (call.mask_kind == COMPRESS_MASK_BOOL && kept[t] == 0) s = -INFINITY;
        scores[t] = s;
        largest = s > largest || s != s ? s : largest;
    }
    return largest;
}

// weights = e^(scores - largest), in place; returns their sum.
float exponentials(float* scores, int64_t tokens, float largest) {
    for (int64_t t = 0; t < tokens; ++t) scores[t] = exponential(scores[t] - largest);
    Floats sums = zeros();
    const int64_t whole = tokens / LANES * LANES;
    for (int64_t t = 0; t < whole; t += LANES) sums = add(sums, load(scores + t));
    float total = sum_of(sums);
    for (int64_t t = whole; t < tokens; ++t) total += scores[t];
    return total;
}

// Query heads that read one KV head: each value is loaded once for all of them.
constexpr int MOST_TOGETHER = 4;

struct Head {
    const float* weights;  // [tokens]
    float* out;            // [head_dim]
    float factor;          // of the sum: one over the sum of the weights
};

// out = factor * sum over tokens of weights times values, for `number` heads.
template <int number>
void attend(const CompressAttention& call, const float* v, const Head* heads) {
    const int64_t size = call.head_dim;
    constexpr int64_t WIDE = 4 * LANES;
    int64_t d = 0;
    for (; d + WIDE <= size; d += WIDE) {
        Floats sums[number][4];
        for (int h = 0; h < number; ++h) {
            for (int i = 0; i < 4; ++i) sums[h][i] = zeros();
        }
        const float* value = v + d;
        for (int64_t t = 0; t < call.tokens; ++t, value += call.v_token) {
            for (int i = 0; i < 4; ++i) {
                const Floats x = load(value + i * LANES);
                for (int h = 0; h < number; ++h) sums[h][i] = fma(all(heads[h].weights[t]), x, sums[h][i]);
            }
        }
        for (int h = 0; h < number; ++h) {
            for (int i = 0; i < 4; ++i) store(heads[h].out + d + i * LANES, mul(sums[h][i], all(heads[h].factor)));
        }
    }
    for (; d < size; ++d) {
        for (int h = 0; h < number; ++h) {
            float sum = 0.0f;
            for (int64_t t = 0; t < call.tokens; ++t) sum += heads[h].weights[t] * v[t * call.v_token + d];
            heads[h].out[d] = sum * heads[h].factor;
        }
    }
}

void attend(const CompressAttention& call, const float* v, const Head* heads, int64_t number) {
    if (number == 1) attend<1>(call, v, heads);
    if (number == 2) attend<2>(call, v, heads);
    if (number == 3) attend<3>(call, v, heads);
    if (number == 4) attend<4>(call, v, heads);
}

// Calls run(b, first, number) for every sequence, and its heads, few at a time, that read one KV head.
template <typename Run>
void each_group(const CompressAttention& call, Run run) {
    const int64_t shared = call.heads / call.kv_heads;
    for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t first = 0; first < call.heads;) {
            const int64_t left = shared - first % shared;
            const int64_t number = left < MOST_TOGETHER ? left : MOST_TOGETHER;
            run(b, first, number);
            first += number;
        }
    }
}

// Attention of every head: rows of scores, at `rows` [MOST_TOGETHER][tokens] for a few heads after the other, or with
// `keep` [batch][heads][tokens], which then become probabilities.
void attend_all(const CompressAttention& call, float* rows, bool keep) {
    const int64_t shared = call.heads / call.kv_heads;
    each_group(call, [&](int64_t b, int64_t first, int64_t number) {
        const int64_t kv = first / shared;
        const float* k = call.k + b * call.k_batch + kv * call.k_head;
        const float* v = call.v + b * call.v_batch + kv * call.v_head;
        const int64_t place = b * call.heads + first;
        Head heads[MOST_TOGETHER];
        for (int64_t h = 0; h < number; ++h) {
            float* scores = rows + (keep ? place + h : h) * call.tokens;
            const float largest = score(call, b, call.q + (place + h) * call.head_dim, k, scores);
            const bool blind = largest == -INFINITY;
            if (blind) std::fill(scores, scores + call.tokens, 0.0f);
            const float factor = blind ? 0.0f : 1.0f / exponentials(scores, call.tokens, largest);
            heads[h] = {scores, call.out + (place + h) * call.head_dim, factor};
        }
        attend(call, v, heads, number);
        if (!keep) return;
        for (int64_t h = 0; h < number; ++h) {
            float* weights = rows + (place + h) * call.tokens;
            for (int64_t t = 0; t < call.tokens; ++t) weights[t] *= heads[h].factor;
        }
    });
}

}  // namespace
}  // namespace compress

extern "C" {

int64_t compress_block_before(const CompressBlock* block, const float* hidden, const float* cos, const float* sin,
                              int64_t count, float* q, float* k, float* v) {
    const compress::Step all[] = {{&block->q, q}, {&block->k, k}, {&block->v, v}};
    compress::Step steps[3];
    int asked = 0;
    for (const compress::Step& step : all) {
        if (step.y != nullptr) steps[asked++] = step;
    }
    if (asked == 0) return 0;  // without a token there is no place for anything
    if (!compress::normed(steps, asked, hidden, block->attention_norm, block->epsilon, count, block->activations,
                          block->threads)) {
        return 1;
    }
    for (int64_t m = 0; m < count; ++m) {
        const float* c = cos + m * block->rotary_dim;
        const float* s = sin + m * block->rotary_dim;
        if (q != nullptr) compress::norm_and_rotate(*block, q + m * block->q.rows, block->heads, block->q_norm, c, s);
        if (k != nullptr) compress::norm_and_rotate(*block, k + m * block->k.rows, block->kv_heads, block->k_norm, c, s);
    }
    return 0;
}

int64_t compress_block_after(const CompressBlock* block, const float* attention, float* hidden, int64_t count) {
    const int64_t values = count * block->hidden;
    const int64_t inner = count * block->gate.rows;
    const compress::Buffer y(values);
    const compress::Buffer gate(inner);
    const compress::Buffer up(inner);
    if (y == nullptr || gate == nullptr || up == nullptr) return 1;

    const compress::Step out[] = {{&block->o, y}};
    if (!compress::run(out, 1, attention, count, block->activations, block->threads)) return 1;
    compress::add_to(hidden, y, values);

    const compress::Step wide[] = {{&block->gate, gate}, {&block->up, up}};
    if (!compress::normed(wide, 2, hidden, block->mlp_norm, block->epsilon, count, block->activations, block->threads)) {
        return 1;
    }
    compress::gated(gate, up, inner, block->act);

    const compress::Step down[] = {{&block->down, y}};
    if (!compress::run(down, 1, gate, count, block->activations, block->threads)) return 1;
    compress::add_to(hidden, y, values);
    return 0;
}

int64_t compress_norm_linear(const CompressLinear* layer, const float* norm, double epsilon, const float* hidden,
                             int64_t count, int64_t activations, int64_t threads, float* y) {
    const compress::Step steps[] = {{layer, y}};
    return compress::normed(steps, 1, hidden, norm, epsilon, count, activations, threads) ? 0 : 1;
}

int64_t compress_decode_attention(const CompressAttention* call) {
    const compress::Buffer scores(compress::MOST_TOGETHER * call->tokens);
    if (scores == nullptr) return 1;
    compress::attend_all(*call, scores, false);
    return 0;
}

int64_t compress_attention_row(const CompressAttention* call, float* weights) {
    compress::attend_all(*call, weights, true);
    return 0;
}

int64_t compress_attention_mix(const CompressAttention* call, const float* weights, const int64_t* head_map) {
    compress::each_group(*call, [&](int64_t b, int64_t first, int64_t number) {
        compress::Head heads[compress::MOST_TOGETHER];
        for (int64_t h = 0; h < number; ++h) {
            const int64_t from = head_map == nullptr ? first + h : head_map[first + h];
            const float* row = weights + (b * call->heads + from) * call->tokens;
            heads[h] = {row, call->out + (b * call->heads + first + h) * call->head_dim, 1.0f};
        }
        const float* v = call->v + b * call->v_batch + first / (call->heads / call->kv_heads) * call->v_head;
        compress::attend(*call, v, heads, number);
    });
    return 0;
}

}  // extern "C"
