// Attention of a few query rows over segments of a KV cache that are stored in different ways: the meaning is
// kernels/segment_attention/reference.py.

#pragma once

#include <cstdint>

#include "quant_linear.h"

extern "C" {

// One side, keys or values. Strides are in elements of the tensor; channel vectors are [batch][kv_heads][2][width].
struct CompressSide {
    const void* codes;      // 2, 4 bits: bytes; 8 bits: int8; 16: floats of `kind`
    const uint16_t* params; // float16 (s, z), s alone for 8 bits; null: s = 1, z = 0
    const void* channels;   // of `channel_kind`; null: c = 1, mu = 0
    int64_t bits;           // 2, 4, 8 or 16
    int64_t kind;           // CompressKind of floats
    int64_t channel_kind;
    int64_t batch, head, token;
    int64_t params_batch, params_head, params_token;
};

struct CompressSegment {
    CompressSide keys;
    CompressSide values;
    const int32_t* bounds;  // [batch][kv_heads][2]
};

struct CompressSegments {
    const CompressSegment* segments;
    const float* q;         // [batch][heads][rows][width]
    float* out;             // the same
    float* lse;             // [batch][heads][rows]
    int64_t count, batch, heads, kv_heads, rows, width, threads;
    double scaling;
};

// Returns 0, or 1 when there is no memory for the scratch.
int64_t compress_segment_attention(const CompressSegments* call);

}  // extern "C"
