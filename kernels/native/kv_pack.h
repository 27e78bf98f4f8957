// Keys or values of a cache quantized and packed, token by token: the meaning is kernels/kv_pack/reference.py.

#pragma once

#include <cstdint>

#include "quant_linear.h"

extern "C" {

// Channel vectors c and mu stand one behind the other, [batch][heads][2][width]. Strides are in elements of the tensor.
struct CompressPack {
    const float* x;
    const void* channels;   // of `channel_kind`, or null: c = 1, mu = 0
    uint8_t* codes;         // int8 for 8 bits
    uint16_t* params;       // float16 (s, z), or s alone for 8 bits; null: codes are rounded from y itself
    int64_t channel_kind;   // CompressKind
    int64_t batch, heads, tokens, width;
    int64_t x_batch, x_head, x_token;
    int64_t codes_batch, codes_head, codes_token;
    int64_t params_batch, params_head, params_token;
    int64_t bits;           // 2, 4 or 8
    int64_t clip;
};

// Returns 0, or 1 when there is no memory for a row.
int64_t compress_kv_pack(const CompressPack* call);

}  // extern "C"
