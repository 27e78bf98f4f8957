"""The C++ path of quant_linear in every build that this processor runs, the layout "rows", and the conversions."""

import pytest
import torch
from compress.kernels import native
from compress.kernels.packing import pack, pack_columns, to_gptq_words, to_gptq_zeros
from compress.kernels.quant_linear import cpu, reference, rows
from compress.kernels.quant_linear.weight import (
    QuantWeight,
    check_checksum,
    checksum,
    dequantize,
    from_codes,
    from_compressed_tensors,
    from_gptq,
    to_codes,
    to_compressed_tensors,
    to_gptq,
)
from torch import Tensor

BUILDS = native.runnable()
WIDTHS = (2, 3, 4, 8)
# N, K, group size: whole blocks, rows and groups that fill none, SmolLM2's widths, one group a row.
SHAPES = ((48, 128, 64), (50, 96, 32), (7, 100, 50), (1, 24, 8), (33, 576, 576), (32, 256, 128))


def parts(
    shape: tuple[int, int, int], bits: int, zero: bool, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(bits + sum(shape))
    N, K, size = shape
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)
    scale = (torch.randn(N, K // size, generator=generator) / 8).to(dtype)  # of either sign
    points = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=generator) if zero else None
    return codes, scale, points


def layer(shape: tuple[int, int, int], bits: int, zero: bool, dtype: torch.dtype = torch.float16) -> QuantWeight:
    return from_codes(*parts(shape, bits, zero, dtype), bits, shape[2], "rows")


def exact(x: Tensor, weight: QuantWeight) -> Tensor:
    codes, scale, zero = to_codes(weight)
    group = torch.arange(weight.shape[1]) // weight.group_size
    point = 2 ** (weight.bits - 1) if zero is None else zero.double()[:, group]
    return x.double() @ ((codes.double() - point) * scale.double()[:, group]).T


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_the_builds_are_there() -> None:
    assert "portable" in [build.name for build in BUILDS]


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_activations_are_exact(build: native.Library, bits: int, shape: tuple[int, int, int]) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for zero in (False, True):
        for count in (1, 2, 4, 5, 8, 13, 24, 41):
            weight = layer(shape, bits, zero, dtypes[count % 3])
            x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count))
            bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
            found = cpu.quant_linear(x, weight, bias, build=build)
            assert error(found, exact(x, weight) + bias.double()) < 1e-6, (zero, count)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_activations_are_rounded(build: native.Library, bits: int, shape: tuple[int, int, int]) -> None:
    for zero in (False, True):
        weight = layer(shape, bits, zero)
        for count in (1, 3, 8, 30):
            x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count))
            found = cpu.quant_linear(x, weight, activations="int8", build=build)
            assert error(found, exact(reference.round_activations(x, shape[2]), weight)) < 1e-6, (zero, count)
            assert error(found, exact(x, weight)) > 1e-4  # and they are rounded


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_extreme_codes_and_activations_do_not_overflow(build: native.Library) -> None:
    for bits in WIDTHS:
        for code in (0, (1 << bits) - 1):
            for sign in (-1.0, 1.0):
                codes = torch.full((16, 256), code, dtype=torch.uint8)
                weight = from_codes(codes, torch.ones(16, 2, dtype=torch.float16), None, bits, 128, "rows")
                x = torch.full((2, 256), sign * 127.0)
                wanted = torch.full((2, 16), 256 * sign * 127.0 * (code - (1 << (bits - 1))))
                for kind in ("float", "int8"):
                    assert torch.equal(cpu.quant_linear(x, weight, activations=kind, build=build), wanted)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_threads_and_repetition_change_no_bit(build: native.Library) -> None:
    weight = layer((150, 192, 64), 4, True)
    for count in (1, 6, 40):
        for kind in ("float", "int8"):
            x = torch.randn(count, 192)
            once = cpu.quant_linear(x, weight, activations=kind, build=build)
            for threads in (1, 2, 3, 64):
                assert torch.equal(cpu.quant_linear(x, weight, activations=kind, threads=threads, build=build), once)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_rows_do_not_depend_on_their_neighbours_in_the_batch(build: native.Library) -> None:
    weight = layer((40, 128, 64), 3, False)
    x = torch.randn(8, 128)
    x[3] = float("nan")
    x[5, 40] = float("inf")
    for kind in ("float", "int8"):
        y = cpu.quant_linear(x, weight, activations=kind, build=build)
        assert y[3].isnan().all()
        assert not y[5].isfinite().any()
        assert y[[0, 1, 2, 4, 6, 7]].isfinite().all()
    zeros = cpu.quant_linear(torch.zeros(2, 128), weight, activations="int8", build=build)
    assert torch.equal(zeros, torch.zeros(2, 40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shape_and_dtype_follow_x(dtype: torch.dtype) -> None:
    weight = layer((20, 64, 32), 4, False)
    x = torch.randn(2, 3, 64).to(dtype)
    y = cpu.quant_linear(x, weight)
    assert y.shape == (2, 3, 20)
    assert y.dtype == dtype
    assert error(y, exact(x.view(6, 64), weight).view(2, 3, 20)) < 1e-2
    assert cpu.quant_linear(x[:0], weight).shape == (0, 3, 20)
    strided = torch.randn(64, 5).to(dtype).T
    assert torch.equal(cpu.quant_linear(strided, weight), cpu.quant_linear(strided.contiguous(), weight))


def test_bad_arguments_are_named() -> None:
    weight = layer((20, 64, 32), 4, False)
    with pytest.raises(ValueError, match=r"expected \[..., 64\]"):
        cpu.quant_linear(torch.randn(2, 65), weight)
    with pytest.raises(ValueError, match="threads=0"):
        cpu.quant_linear(torch.randn(2, 64), weight, threads=0)
    with pytest.raises(ValueError, match=r"bias must be float32 of shape \[20\]"):
        cpu.quant_linear(torch.randn(2, 64), weight, torch.zeros(19))
    planes = from_codes(*parts((16, 64, 32), 4, False), 4, 32, "planes")
    assert not cpu.supports(torch.randn(1, 64), planes)
    with pytest.raises(ValueError, match='read layout "rows"'):
        cpu.quant_linear(torch.randn(1, 64), planes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_take_the_bytes_of_their_codes_and_come_back(bits: int, shape: tuple[int, int, int]) -> None:
    codes, scale, _ = parts(shape, bits, False)
    packed = rows.pack(codes, bits, shape[2])
    assert packed.nbytes == -(-shape[0] // 16) * rows.chunks_of(shape[1], shape[2]) * 64 * bits
    assert torch.equal(rows.unpack(packed, bits, shape[2], shape[:2]), codes)
    assert torch.equal(rows.unpack_by_group(rows.pack_by_group(scale), shape[0]), scale)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zero", [False, True])
def test_compressed_tensors_words_come_back_bit_for_bit(layout: str, bits: int, zero: bool) -> None:
    codes, scale, points = parts((50, 96, 32), bits, zero, torch.bfloat16)
    words, zero_words = pack(codes, bits), None if points is None else pack_columns(points, bits)
    weight = from_compressed_tensors(words, scale, zero_words, (50, 96), bits, 32, layout)
    back = to_compressed_tensors(weight)
    assert torch.equal(back[0], words)
    assert torch.equal(back[1], scale)
    assert (back[2] is None) == (zero_words is None)
    assert back[2] is None or torch.equal(back[2], zero_words)
    point = 2 ** (bits - 1) if points is None else points.float().repeat_interleave(32, 1)
    wanted = (codes.float() - point) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(dequantize(weight), wanted)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("zero", [False, True])
def test_gptq_words_come_back_bit_for_bit(layout: str, bits: int, version: int, zero: bool) -> None:
    codes, scale, points = parts((32, 96, 32), bits, zero)
    stored = torch.full((32, 3), 1 << (bits - 1), dtype=torch.uint8) if points is None else points.clamp_min(1)
    words = to_gptq_words(pack(codes, bits))
    zeros = to_gptq_zeros(pack_columns(stored, bits), bits, 32, version)
    weight = from_gptq(words, scale.T.contiguous(), zeros, bits, layout, version)
    assert (weight.zero is not None) == zero
    for found, wanted in zip(to_gptq(weight, version), (words, scale.T, zeros), strict=True):
        assert torch.equal(found, wanted)


def test_one_group_a_row() -> None:
    codes, scale, _ = parts((16, 96, 96), 4, False)
    assert from_codes(codes, scale, None, 4, -1, "rows").group_size == 96


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"words": torch.zeros(16, 7, dtype=torch.int32)}, r"packed weight: expected int32 of shape \[16, 8\]"),
        ({"words": torch.zeros(16, 8)}, "packed weight: expected int32.*got float32"),
        ({"scale": torch.zeros(16, 3)}, r"scale: expected .* of shape \[16, 2\]"),
        ({"scale": torch.zeros(16, 2, dtype=torch.float64)}, "scale: .*got float64"),
        ({"zero_point": torch.zeros(3, 2, dtype=torch.int32)}, r"zero point: expected int32 of shape \[2, 2\]"),
        ({"bits": 5}, "bits=5: unknown width; allowed: 2, 3, 4, 8"),
        ({"group_size": 48}, "group_size=48 doesn't divide the 64 inputs"),
        ({"group_size": 0}, "group_size=0"),
        ({"shape": (0, 64)}, "holds nothing"),
        ({"layout": "tiles"}, "allowed: planes, rows"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, object], said: str) -> None:
    given = {
        "words": torch.zeros(16, 8, dtype=torch.int32),
        "scale": torch.ones(16, 2),
        "zero_point": None,
        "shape": (16, 64),
        "bits": 4,
        "group_size": 32,
        "layout": "rows",
    }
    from_compressed_tensors(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        from_compressed_tensors(**(given | change))  # type: ignore[arg-type]


def test_gptq_tensors_that_do_not_fit_are_named() -> None:
    words, scale, zeros = torch.zeros(8, 32, dtype=torch.int32), torch.ones(2, 32), torch.zeros(2, 4, dtype=torch.int32)
    from_gptq(words, scale, zeros, 4, "rows")
    with pytest.raises(ValueError, match="version=3"):
        from_gptq(words, scale, zeros, 4, "rows", 3)
    with pytest.raises(ValueError, match="qzeros"):
        from_gptq(words, scale, zeros[:, :3], 4, "rows")
    with pytest.raises(ValueError, match="3 groups"):
        from_gptq(words, torch.ones(3, 32), zeros, 4, "rows")
    with pytest.raises(ValueError, match="whole words"):
        to_gptq(layer((16, 36, 12), 4, False))


def test_checksums() -> None:
    words = torch.arange(12, dtype=torch.int32).view(3, 4)
    check_checksum("w", words, checksum(words).upper())
    assert checksum(words.T.contiguous().T) == checksum(words)
    damaged = words.clone()
    damaged[1, 2] += 1
    with pytest.raises(ValueError, match="w: the checksum is"):
        check_checksum("w", damaged, checksum(words))


def test_bytes_of_storage() -> None:
    weight = layer((64, 128, 64), 4, False)
    assert weight.nbytes == 64 * 128 // 2 + 64 * 2 * 2
