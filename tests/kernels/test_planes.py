"""Layout "planes" and the choice of path of `quant_linear`."""

import pytest
import torch
from compress.kernels.quant_linear import from_codes, path, planes, quant_linear, to_codes, triton
from compress.kernels.quant_linear.weight import QuantWeight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "K"), [(8, 24), (16, 48), (32, 96), (64, 576), (128, 256), (576, 576), (24, 72)]
)
def test_planes_round_trip(bits: int, group_size: int, K: int):
    codes = torch.randint(0, 1 << bits, (13, K), dtype=torch.uint8)
    packed = planes.pack(codes, bits, group_size)
    assert packed.shape == (K * bits // 8, 13)
    assert packed.is_contiguous()
    assert torch.equal(planes.unpack(packed, bits, group_size, (13, K)), codes)


@pytest.mark.parametrize(
    ("group_size", "unit"), [(8, 8), (24, 8), (32, 32), (64, 64), (128, 128), (256, 128), (576, 64)]
)
def test_unit(group_size: int, unit: int):
    assert planes.unit(group_size) == unit


def test_unit_needs_whole_bytes_of_high_bits():
    with pytest.raises(ValueError, match="group_size=12: layout planes needs a multiple of 8"):
        planes.unit(12)


@pytest.mark.parametrize(
    ("bits", "k", "row", "value"),
    [
        (4, 64 + 40, 32 + 8, 15 << 4),  # second unit of 64: plane 1 of 32 rows, row 8
        (2, 64 + 40, 16 + 8, 3 << 4),  # plane 2 of 16 rows, row 8
        (8, 64 + 40, 64 + 40, 255),
    ],
)
def test_where_a_code_stands(bits: int, k: int, row: int, value: int):
    codes = torch.zeros(3, 128, dtype=torch.uint8)
    codes[1, k] = (1 << bits) - 1
    expected = torch.zeros(128 * bits // 8, 3, dtype=torch.uint8)
    expected[row, 1] = value
    assert torch.equal(planes.pack(codes, bits, 64), expected)


def test_where_the_two_parts_of_three_bits_stand():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 64 + 40] = 7
    expected = torch.zeros(48, 1, dtype=torch.uint8)
    expected[24 + 8] = 3 << 4  # low bits: plane 2 of 16 rows, row 8
    expected[24 + 16 + 0] = 1 << 5  # high bit: plane 5 of 8 rows, row 0
    assert torch.equal(planes.pack(codes, 3, 64), expected)


def _weight(layout: str = "planes", group_size: int = 32) -> QuantWeight:
    codes = torch.randint(0, 16, (24, 96), dtype=torch.uint8)
    return from_codes(codes, torch.rand(24, 96 // group_size).half(), None, 4, group_size, layout)


def test_weight_keeps_codes_in_planes():
    codes = torch.randint(0, 8, (24, 96), dtype=torch.uint8)
    scale = torch.rand(24, 3)
    zero = torch.randint(0, 8, (24, 3), dtype=torch.uint8)
    found = to_codes(from_codes(codes, scale, zero, 3, 32, "planes"))
    assert all(torch.equal(a, b) for a, b in zip(found, (codes, scale, zero), strict=True))


def test_planes_on_a_cpu_take_the_reference():
    assert path(torch.zeros(1, 96), _weight()) == "reference"


def test_what_the_gpu_has_kernels_for():
    x = torch.zeros(1, 96, dtype=torch.float16)
    assert triton.supports(x, _weight())
    assert not triton.supports(x.double(), _weight())
    assert not triton.supports(x, _weight(group_size=24))
    assert not triton.supports(x, _weight("rows"))
    with pytest.raises(ValueError, match="layout planes with groups of 24"):
        triton.quant_linear(x, _weight(group_size=24))


@pytest.mark.parametrize(
    ("x", "bias", "activations", "problem"),
    [
        (torch.zeros(2, 95), None, "float", r"shape \[\.\.\., 96\], got torch.float32 \[2, 95\]"),
        (torch.zeros(2, 96, dtype=torch.int32), None, "float", "floating point"),
        (torch.zeros(()), None, "float", "floating point of shape"),
        (torch.zeros(2, 96), torch.zeros(23), "float", r"bias must have shape \[24\], got \[23\]"),
        (torch.zeros(2, 96), None, "int4", "activations='int4': unknown; allowed: float, int8"),
        (torch.zeros(2, 96, device="meta"), None, "float", "different devices: .*cpu.*meta"),
    ],
)
def test_arguments_that_do_not_fit(x: torch.Tensor, bias: torch.Tensor | None, activations: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        quant_linear(x, _weight(), bias, activations)


def test_rows_are_for_a_cpu():
    weight = _weight("rows").to("meta")
    with pytest.raises(ValueError, match='layout "rows" is for a CPU, and the activations are on meta'):
        quant_linear(torch.zeros(1, 96, device="meta"), weight)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 255])
def test_parts_cover_every_unit_once(rows: int):
    x = torch.empty(rows, 576, dtype=torch.float16, device="meta")
    codes = torch.zeros(192, 576, dtype=torch.uint8)
    weight = from_codes(codes, torch.ones(192, 9).half(), None, 4, 64, "planes").to("meta")
    y, launches = triton.product_launches(x, weight, None)
    multiply = launches[0]
    share, splits = multiply.arguments["share"], multiply.grid[2]
    assert (splits - 1) * share < 9 <= splits * share
    assert len(launches) == (1 if splits == 1 else 2)
    assert y.shape == (rows, 192)


def test_one_part_where_the_tiles_fill_the_gpu():
    x = torch.empty(1, 64, dtype=torch.float16, device="meta")
    scale = torch.empty(1, 40_000, dtype=torch.float16, device="meta")
    codes = torch.empty(32, 40_000, dtype=torch.uint8, device="meta")
    _, launches = triton.product_launches(x, QuantWeight(codes, scale, None, (40_000, 64), 4, 64, "planes"), None)
    assert [launch.constexprs.get("WHOLE") for launch in launches] == [True]
