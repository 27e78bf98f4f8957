// A packed linear layer as the CPU kernels read it, and the two steps of y = x W^T + b: activations are prepared once for
// all the layers that read them, then each layer goes over its weights once.
//
// Layout "rows". 16 output rows make a block, 32 inputs make a chunk; a group of inputs that share a scale fills whole
// chunks (its last one is padded, with activations 0). A chunk of a block is `bits` vectors of 64 bytes, 4 bytes a row.
// With input k = 4 j + b of the chunk (j = 0..7, b = 0..3), its code stands in byte b of the row's 4 bytes,
//   8 bits: of vector j;
//   4 bits: of vector j / 2, at bit 4 (j % 2);
//   2 bits: of vector j / 4, at bit 2 (j % 4);
//   3 bits: the two low bits as with 2 bits, the third of vector 2, at bit j.
// So one load serves 16 rows, 4 neighbouring inputs of a row stand together as byte dot products want them, and no sum
// across a register is ever needed. Scales and zero points stand as [block][group][16].

#pragma once

#include <cstdint>

extern "C" {

enum CompressKind : int64_t { COMPRESS_FLOAT32 = 0, COMPRESS_FLOAT16 = 1, COMPRESS_BFLOAT16 = 2 };
enum CompressActivations : int64_t { COMPRESS_ACTIVATIONS_FLOAT = 0, COMPRESS_ACTIVATIONS_INT8 = 1 };

// bits 2, 3, 4, 8: packed codes. bits 0: `codes` is a plain [rows][columns] matrix of `kind`, without scale and zero.
struct CompressLinear {
    const void* codes;
    const void* scale;     // of `kind`
    const uint8_t* zero;   // null: symmetric, the zero point is 2^(bits-1)
    const float* bias;     // [rows], or null
    int64_t rows;          // N, outputs
    int64_t columns;       // K, inputs
    int64_t bits;
    int64_t group_size;    // divides columns
    int64_t kind;          // CompressKind of scale (bits > 0) or of codes (bits == 0)
};

// y [count][rows] = x [count][columns] W^T + bias. `activations`: CompressActivations; int8 quantizes each chunk of 32
// inputs by its largest magnitude. `threads` share the rows out; every row is summed by one thread, in one order.
// Returns 0, or 1 when there is no memory for the prepared activations.
int64_t compress_quant_linear(const CompressLinear* layer, const float* x, float* y, int64_t count, int64_t activations,
                              int64_t threads);

// The packed rows of the blocks [first, last), 16 rows each, dequantized: out [columns][(last - first) * 16]. What stands
// behind the layer's last row is no weight.
void compress_expand(const CompressLinear* layer, int64_t first, int64_t last, float* out);

}  // extern "C"

namespace compress {

constexpr int64_t BLOCK = 16;  // output rows
constexpr int64_t CHUNK = 32;  // inputs

// Activations in the form that layers of one number of columns and one group size read.
class Activations {
   public:
    Activations() = default;
    ~Activations();
    Activations(const Activations&) = delete;
    Activations& operator=(const Activations&) = delete;

    // False when there is no memory.
    bool prepare(const CompressLinear& layer, const float* x, int64_t count, int64_t activations);
    // Whether `layer` can read what was prepared for `other`.
    static bool shared(const CompressLinear& layer, const CompressLinear& other);

    int64_t count = 0;      // M, tokens
    int64_t chunks = 0;     // of one token
    int64_t groups = 0;
    bool int8 = false;
    const float* plain = nullptr;  // [count][columns], what was given
    // Tokens are cut into tiles of T = 1, 4 or 8 tokens (`tile_of`), in which tokens stand innermost. All
    // start at the tile's first token times the length of a token.
    float* x = nullptr;          // [chunks][32][T], not for int8
    int8_t* codes = nullptr;     // [chunks][8][T][4], int8 only
    float* scale = nullptr;      // [chunks][T], int8 only
    int32_t* sum = nullptr;      // [chunks][T]: sums of codes, int8 only
    float* group_sum = nullptr;  // [groups][T]: sums of what the activations stand for

   private:
    void* memory_ = nullptr;
    bool allocate(bool packed);
    void fill_tile(const CompressLinear& layer, int64_t token, int64_t tokens);
};

// y [count][stride] = prepared activations times the layer; row n of the layer goes to y[m * stride + n].
void apply(const CompressLinear& layer, const Activations& input, float* y, int64_t stride, int64_t threads);

}  // namespace compress
