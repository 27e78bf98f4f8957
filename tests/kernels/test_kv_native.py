"""Every C++ build of `kv_pack` and `segment_attention` against the reference, on awkward shapes and strides."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from compress.kernels import native
from compress.kernels.kv_pack import cpu as pack_cpu
from compress.kernels.kv_pack import reference as pack_reference
from compress.kernels.segment_attention import Segment, cpu, reference
from torch import Tensor

BUILDS = native.runnable()
WIDTHS = (8, 24, 64, 80, 96, 128, 256)

pytestmark = pytest.mark.skipif(not BUILDS, reason="no C++ compiler was there")
builds = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def separable(x: Tensor) -> Tensor:
    return torch.stack([x.abs().amax(2).sqrt(), x.mean(2)], 2)


def inside(room: Tensor, first: int) -> Tensor:
    """Slots of a larger tensor, between others."""
    return room[:, :, first : room.shape[2] - first]


def segment(key_bits: int, value_bits: int, width: int, slots: int, kind: torch.dtype = torch.float16) -> Segment:
    """Two sequences of two KV heads with different bounds, NaN in every parameter and float outside of them."""
    bounds = torch.tensor([[[0, slots], [1, slots - 1]], [[slots // 2, slots // 2], [slots - 1, slots]]]).int()
    slot = torch.arange(slots)
    missing = ((slot < bounds[..., :1]) | (slot >= bounds[..., 1:]))[..., None]

    def side(bits: int, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = random(2, 2, slots, width, seed=seed) * 2
        if bits == 16:
            return x.masked_fill(missing, torch.nan).to(kind), None, separable(x).half()
        channels = None if bits == 8 else separable(x)
        codes, params = pack_reference.kv_pack(x, bits, channels)
        assert params is not None
        room = torch.full((2, 2, slots + 4, params.shape[3]), torch.nan).half()
        own = inside(room, 2)
        own.copy_(params.masked_fill(missing, torch.nan))
        spread = torch.zeros(2, 2, slots, codes.shape[3] + 3, dtype=codes.dtype)[..., : codes.shape[3]]
        return spread.copy_(codes), own, channels

    (keys, key_params, key_channels), (values, value_params, value_channels) = side(key_bits, 1), side(value_bits, 2)
    return Segment(
        keys, values, key_bits, value_bits, key_params, value_params, key_channels, value_channels, bounds, slots
    )


def assert_equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@builds
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 3), (1, 8), (3, 4), (70, 3)])
def test_attention(build: native.Library, width: int, rows: int, group: int) -> None:
    segments = [segment(4, 4, width, 130), segment(2, 2, width, 67), segment(4, 2, width, 1), segment(8, 8, width, 64)]
    segments.append(segment(16, 16, width, 5))
    q, scaling = random(2, 2 * group, rows, width), width**-0.5
    assert_equal(cpu.segment_attention(q, segments, scaling, build), reference.segment_attention(q, segments, scaling))


@builds
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_float_segments(build: native.Library, kind: torch.dtype) -> None:
    segments, q = [segment(16, 16, 40, 70, kind), segment(16, 2, 40, 9, kind)], random(2, 4, 2, 40)
    assert_equal(cpu.segment_attention(q, segments, 0.2, build), reference.segment_attention(q, segments, 0.2))


@builds
def test_large_scores(build: native.Library) -> None:
    """Each tile's scores are far above those before it, and far below in the turned order."""
    x = random(1, 1, 200, 64)
    grown = x * torch.linspace(0, 40, 200)[:, None]
    bounds = torch.tensor([[[0, 200]]]).int()
    for keys in (grown, grown.flip(2)):
        whole = Segment(keys, x, 16, 16, None, None, None, None, bounds, 200)
        assert_equal(
            cpu.segment_attention(x[:, :, :3], [whole], 1.0, build),
            reference.segment_attention(x[:, :, :3], [whole], 1.0),
        )


@builds
@pytest.mark.parametrize("side", ["key_params", "value_params"])
def test_attention_to_what_is_not_finite(build: native.Library, side: str) -> None:
    """It reaches the output of its own head, in the first tile and in later ones."""
    for slot in (0, 100):
        held, q = segment(8, 8, 64, 130), random(2, 4, 1, 64)
        getattr(held, side)[0, 0, slot] = torch.nan
        for out, _ in (cpu.segment_attention(q, [held], 0.2, build), reference.segment_attention(q, [held], 0.2)):
            assert out[0, :2].isnan().all()
            assert out[0, 2:].isfinite().all()


@builds
def test_bounds_are_read_at_every_call(build: native.Library) -> None:
    held, q = segment(4, 2, 64, 90), random(2, 6, 1, 64)
    prepared = cpu.Prepared([held], build)
    before = prepared(q, 0.2)[0]
    held.bounds[0, 0, 1] = 50
    found = prepared(q, 0.2)
    assert not torch.equal(found[0][0, :3], before[0, :3])
    assert_equal(found, reference.segment_attention(q, [held], 0.2))


@builds
def test_threads_change_no_bit(build: native.Library) -> None:
    held, q = [segment(4, 2, 64, 90)], random(2, 6, 1, 64)
    one = cpu.Prepared(held, build)(q, 0.2)
    for threads in (2, 9):
        assert all(map(torch.equal, cpu.Prepared(held, build, threads)(q, 0.2), one))


@contextmanager
def no_threads() -> Iterator[None]:
    """No thread can start, because its stack would be larger than the address space."""
    libc, held, huge = ctypes.CDLL(None), ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    assert libc.pthread_getattr_default_np(held) == libc.pthread_getattr_default_np(huge) == 0
    assert libc.pthread_attr_setstacksize(huge, ctypes.c_size_t(1 << 60)) == 0
    assert libc.pthread_setattr_default_np(huge) == 0
    try:
        yield
    finally:
        assert libc.pthread_setattr_default_np(held) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc lets a program choose the size of stacks")
@builds
def test_a_system_without_threads_left(build: native.Library) -> None:
    held, q = [segment(4, 2, 64, 90)], random(2, 6, 1, 64)
    one, many = cpu.Prepared(held, build)(q, 0.2), cpu.Prepared(held, build, 4)
    with no_threads():
        found = many(q, 0.2)
    assert all(map(torch.equal, found, one))


@builds
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("bits", "clip"), [(2, False), (2, True), (4, False), (4, True), (8, False)])
def test_what_is_not_finite_stays_visible(build: native.Library, width: int, bits: int, clip: bool) -> None:
    """In every channel in turn; the tokens beside it lose nothing."""
    spoiled = random(1, 1, 3 * width + 1, width)
    for token in range(3 * width):
        spoiled[0, 0, token, token % width] = (torch.nan, torch.inf, -torch.inf)[token // width]
    codes, params = pack_cpu.kv_pack(spoiled, bits, None, (clip, True), build)
    wanted_codes, wanted = pack_reference.kv_pack(spoiled, bits, None, clip)
    assert params is not None
    assert not params[:, :, :-1].isfinite().all(-1).any()
    torch.testing.assert_close(params, wanted, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(codes[:, :, -1], wanted_codes[:, :, -1])


@builds
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_token", [True, False])
def test_packing(build: native.Library, width: int, bits: int, per_token: bool) -> None:
    x = random(2, 33, 3, width).transpose(1, 2)
    channels = None if bits == 8 else separable(x)
    if not per_token:
        low, high = x.aminmax(dim=2)
        channels = None if bits == 8 else torch.stack([(high - low) / (2**bits - 1), low], 2)
    wanted = pack_reference.kv_pack(x, bits, channels, True, per_token)
    rooms = [None if t is None else torch.full((2, 3, 37, t.shape[3]), 77).to(t.dtype) for t in wanted]
    codes, params = [None if room is None else inside(room, 2) for room in rooms]
    assert codes is not None
    pack_cpu.kv_pack(x, bits, channels, (True, per_token), build, (codes, params))
    for room, right in zip(rooms, wanted, strict=True):
        if room is not None and right is not None:
            assert torch.equal(inside(room, 2), right)
            assert (room[:, :, [0, 1, -2, -1]] == 77).all()
