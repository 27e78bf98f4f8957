// One decoder layer of the Llama family for one new token of each of `count` sequences (count <= 8 is what it's made
// for), around an attention that the caller runs between the two calls; and that attention, for a plain fp32 cache.
//
//   compress_block_before:    hidden -> RMSNorm -> q, k, v (+ bias) -> optional norm of q and k by head -> RoPE
//   (attention)
//   compress_block_after:     o -> + hidden -> RMSNorm -> gate, up -> act(gate) * up -> down -> + hidden
//   compress_norm_linear:     RMSNorm -> a linear layer; the end of a model
//
// A layer that takes its attention from an earlier one has no q and k, one that takes keys and values no k and v: their
// structures aren't looked at where compress_block_before is given no place for them.
//
// All activations are fp32 and contiguous. Functions return 0, or 1 when there is no memory for their scratch.
// The Python mirror of the structures is kernels/block/cpu.py.

#pragma once

#include "quant_linear.h"

extern "C" {

enum CompressGate : int64_t { COMPRESS_SILU = 0, COMPRESS_GELU_TANH = 1 };
enum CompressMask : int64_t { COMPRESS_MASK_NONE = 0, COMPRESS_MASK_BOOL = 1, COMPRESS_MASK_FLOAT = 2 };

struct CompressBlock {
    CompressLinear q, k, v, o, gate, up, down;
    const float* attention_norm;  // [hidden]; what the normed values are multiplied by
    const float* mlp_norm;        // [hidden]
    const float* q_norm;          // [head_dim], or null
    const float* k_norm;          // [head_dim], or null
    double epsilon;               // of every norm
    int64_t hidden;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t rotary_dim;           // first dimensions of a head that RoPE turns; even
    int64_t act;                  // CompressGate
    int64_t activations;          // CompressActivations of all the layers
    int64_t threads;
};

// hidden [count][hidden]; cos, sin [count][rotary_dim], as transformers gives them (second half repeats the first).
// Out: q [count][heads][head_dim], k and v [count][kv_heads][head_dim]; what is null isn't computed.
int64_t compress_block_before(const CompressBlock* block, const float* hidden, const float* cos, const float* sin,
                              int64_t count, float* q, float* k, float* v);

// attention [count][heads * head_dim]; hidden [count][hidden] is the layer's input and becomes its output.
int64_t compress_block_after(const CompressBlock* block, const float* attention, float* hidden, int64_t count);

// y [count][layer->rows] = layer(RMSNorm(hidden)).
int64_t compress_norm_linear(const CompressLinear* layer, const float* norm, double epsilon, const float* hidden,
                             int64_t count, int64_t activations, int64_t threads, float* y);

struct CompressAttention {
    const float* q;       // [batch][heads][head_dim]
    const float* k;       // element (b, h, t, d) at b * k_batch + h * k_head + t * k_token + d
    const float* v;
    const void* mask;     // [batch][tokens] with stride mask_batch: uint8 (0: don't look) or float added to the score
    float* out;           // [batch][heads][head_dim]
    int64_t mask_kind;    // CompressMask
    int64_t mask_batch;
    int64_t k_batch, k_head, k_token;
    int64_t v_batch, v_head, v_token;
    int64_t batch, heads, kv_heads, tokens, head_dim;
    double scaling;       // of the scores
};

// softmax(scaling q k^T + mask) v for one query token a sequence; query head h reads KV head h / (heads / kv_heads).
// A sequence whose mask leaves nothing gets zeros.
int64_t compress_decode_attention(const CompressAttention* call);

// The same, which leaves its probabilities for later layers: weights [batch][heads][tokens], each row's sum is 1, or 0
// where the mask leaves nothing.
int64_t compress_attention_row(const CompressAttention* call, float* weights);

// weights v with the probabilities of another layer: its query head head_map[h], or h where it is null, for query head h.
// Of the call, q, k, mask and scaling aren't read.
int64_t compress_attention_mix(const CompressAttention* call, const float* weights, const int64_t* head_map);

}  // extern "C"
