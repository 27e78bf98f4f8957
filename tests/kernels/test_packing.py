"""Bit packing, against compressed-tensors and against bits counted one by one."""

import pytest
import torch
from compress.kernels.packing import (
    BIT_WIDTHS,
    from_gptq_words,
    pack,
    pack_columns,
    packed_words,
    reference,
    symmetric_zero_words,
    to_gptq_words,
    to_gptq_zeros,
    to_q4_0,
    to_q8_0,
    unpack,
    unpack_columns,
)
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

COLUMNS = (1, 3, 8, 10, 11, 31, 32, 33, 64, 95, 96, 384)


def random_codes(rows: int, columns: int, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + columns)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(dtype)


def as_signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def words_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The definition, on Python integers: the row as one number, cut into 32 bits at a time, as signed words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BIT_WIDTHS)
class TestAgainstOthers:
    def test_definition(self, bits, columns):
        codes = random_codes(2, columns, bits)
        assert pack(codes, bits).tolist() == [words_bit_by_bit(row, bits) for row in codes.tolist()]

    def test_compressed_tensors_packs_the_same_words(self, bits, columns):
        codes = random_codes(5, columns, bits)
        words = pack(codes, bits)
        theirs = pack_to_int32(as_signed(codes, bits), bits)
        assert words.dtype == theirs.dtype == torch.int32
        assert torch.equal(words, theirs)

    def test_compressed_tensors_reads_ours(self, bits, columns):
        codes = random_codes(5, columns, bits)
        theirs = unpack_from_int32(pack(codes, bits), bits, codes.shape)
        assert torch.equal(theirs, as_signed(codes, bits))

    def test_zero_points_along_dim_0(self, bits, columns):
        codes = random_codes(columns, 5, bits)
        words = pack_columns(codes, bits)
        assert words.shape == (packed_words(columns, bits), 5)
        assert words.is_contiguous()
        assert torch.equal(words, pack_to_int32(as_signed(codes, bits), bits, packed_dim=0))
        assert torch.equal(unpack_columns(words, bits, columns), codes)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_round_trip(self, bits, columns, dtype):
        codes = random_codes(3, columns, bits, dtype)
        back = unpack(pack(codes, bits), bits, columns)
        assert back.dtype == torch.uint8
        assert torch.equal(back.to(dtype), codes)


def test_three_bit_codes_straddle_words():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = codes[0, 21] = 7
    assert [w & 0xFFFFFFFF for w in pack(codes, 3)[0].tolist()] == [0xC0000000, 0x80000001, 0x00000003]


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_row_chunks_give_the_same_words(bits, monkeypatch):
    codes = random_codes(37, 50, bits)
    whole = pack(codes, bits)
    monkeypatch.setattr(reference, "_CHUNK", 150)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 50), codes)


def test_strided_input():
    codes = random_codes(40, 24, 3)
    words = pack(codes.T, 3)
    assert torch.equal(words, pack(codes.T.contiguous(), 3))
    assert torch.equal(unpack(words.T.contiguous().T, 3, 40), codes.T)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_strides_of_dimensions_of_size_1(bits):
    """A transposed single row keeps its odd stride and still counts as contiguous."""
    codes = random_codes(1, 5, bits)
    words = torch.empty(1, 5, dtype=torch.int32).copy_(pack_columns(codes, bits))
    assert words.T.stride() == (1, 5)
    assert torch.equal(unpack_columns(words, bits, 1), codes)
    row = torch.empty_strided((1, 1), (3, 1), dtype=torch.int32).copy_(pack(codes[:, :2], bits))
    assert torch.equal(unpack(row, bits, 2), codes[:, :2])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    words = pack(codes, 3)
    assert words.shape == (shape[0], packed_words(shape[1], 3))
    assert unpack(words, 3, shape[1]).shape == shape


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("bad", [-1, "top"])
def test_codes_out_of_range(bits, bad):
    codes = torch.zeros(2, 4, dtype=torch.int32)
    codes[1, 2] = (1 << bits) if bad == "top" else bad
    with pytest.raises(ValueError, match=rf"within \[0, {(1 << bits) - 1}\]"):
        pack(codes, bits)


def test_refusals():
    codes = random_codes(2, 8, 3)
    with pytest.raises(ValueError, match="bits=5"):
        pack(codes, 5)
    with pytest.raises(ValueError, match="matrix of integers"):
        pack(codes.float(), 3)
    with pytest.raises(ValueError, match="matrix of integers"):
        pack(codes[0], 3)
    words = pack(codes, 3)
    with pytest.raises(ValueError, match="bits=6"):
        unpack(words, 6, 8)
    with pytest.raises(ValueError, match=r"\[rows, 2\]"):
        unpack(words, 3, 20)
    with pytest.raises(ValueError, match="int64"):
        unpack(words.long(), 3, 8)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_gptq_words_follow_the_reader_of_gptq(bits):
    """Dequantise as GPTQ readers do: code k of output n lies at bit k*b of column n of qweight."""
    codes = random_codes(6, 64, bits)
    words = pack(codes, bits)
    qweight = to_gptq_words(words)
    assert qweight.shape == (64 * bits // 32, 6)
    assert qweight.is_contiguous()
    for n in range(6):
        stream = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(qweight[:, n].tolist()))
        assert [(stream >> (bits * k)) & ((1 << bits) - 1) for k in range(64)] == codes[n].tolist()
    assert torch.equal(from_gptq_words(qweight), words)


@pytest.mark.parametrize(
    ("bits", "version", "period"),
    [
        (2, 1, [0x55555555]),
        (3, 1, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, 1, [0x77777777]),
        (8, 1, [0x7F7F7F7F]),
        (2, 2, [0xAAAAAAAA]),
        (3, 2, [0x24924924, 0x49249249, 0x92492492]),
        (4, 2, [0x88888888]),
        (8, 2, [0x80808080]),
    ],
)
def test_symmetric_zero_words(bits, version, period):
    words = symmetric_zero_words(bits, 64, version)
    assert words.dtype == torch.int32
    assert [w & 0xFFFFFFFF for w in words.tolist()] == period * (2 * bits // len(period))


def test_symmetric_zero_words_refusals():
    with pytest.raises(ValueError, match="version=3"):
        symmetric_zero_words(4, 32, 3)
    with pytest.raises(ValueError, match="whole words"):
        symmetric_zero_words(3, 40, 1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points(bits, version):
    zeros = random_codes(32, 5, bits).clamp(min=1)
    qzeros = to_gptq_zeros(pack_columns(zeros, bits), bits, 32, version)
    assert qzeros.shape == (5, bits)
    assert torch.equal(unpack(qzeros, bits, 32), zeros.T - (2 - version))
    with pytest.raises(ValueError, match="whole words"):
        to_gptq_zeros(pack_columns(zeros[:3], bits), bits, 3, version)


def test_version_1_has_no_zero_point_0():
    zeros = torch.ones(32, 2, dtype=torch.uint8)
    zeros[3, 1] = 0
    words = pack_columns(zeros, 4)
    assert torch.equal(unpack(to_gptq_zeros(words, 4, 32, 2), 4, 32), zeros.T)
    with pytest.raises(ValueError, match="a zero point is 0"):
        to_gptq_zeros(words, 4, 32, 1)


@pytest.mark.parametrize(
    ("bits", "kind", "encode"),
    [(4, GGMLQuantizationType.Q4_0, to_q4_0), (8, GGMLQuantizationType.Q8_0, to_q8_0)],
)
def test_gguf_blocks_are_read_exactly(bits, kind, encode):
    codes = random_codes(7, 96, bits)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])  # the ends of the range
    scale = torch.randn(7, 3, generator=torch.Generator().manual_seed(bits)).half()  # of either sign
    blocks = encode(codes, scale)
    assert blocks.shape == (7, 3 * GGML_QUANT_SIZES[kind][1])
    expected = as_signed(codes, bits).float().view(7, 3, 32) * scale.float()[..., None]
    assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), kind)), expected.view(7, 96))


@pytest.mark.parametrize("encode", [to_q4_0, to_q8_0])
def test_gguf_refusals(encode):
    codes = random_codes(2, 64, 4)
    with pytest.raises(ValueError, match="float16 scales"):
        encode(codes, torch.ones(2, 2))
    with pytest.raises(ValueError, match="float16 scales"):
        encode(codes, torch.ones(2, 4).half())
    with pytest.raises(ValueError, match="aren't a multiple of 32"):
        encode(codes[:, :40], torch.ones(2, 1).half())
