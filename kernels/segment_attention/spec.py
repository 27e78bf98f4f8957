"""What the proofs need to know of `segment_attention`."""

from dataclasses import dataclass
from typing import Any

import torch
from compress.kernels import native
from compress.kernels import segment_attention as op
from compress.kernels.proofs import DTYPES, Case, Compiled, Limits, OpSpec
from compress.kernels.segment_attention import cpu, reference, triton
from compress.kernels.segment_attention.segment import Segment
from compress.kernels.triton_support import Launch
from torch import Tensor


def _exact(q: Tensor, segments: tuple[Segment, ...], scaling: float) -> tuple[Tensor, Tensor]:
    """Row by row in float64, each over the list of the slots that it sees."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        sides = [_slots(segment, b, h * segment.keys.shape[1] // q.shape[1]) for segment in segments]
        keys = torch.cat([q.new_empty(0, q.shape[3], dtype=torch.float64), *(keys for keys, _ in sides)])
        values = torch.cat([q.new_empty(0, q.shape[3], dtype=torch.float64), *(values for _, values in sides)])
        for r in range(q.shape[2] if len(keys) else 0):
            scores = keys @ q[b, h, r].double() * scaling
            out[b, h, r] = scores.softmax(0) @ values
            lse[b, h, r] = scores.logsumexp(0)
    return out, lse


def _slots(segment: Segment, b: int, kv_head: int) -> tuple[Tensor, Tensor]:
    """The keys and values of one head that are within bounds, by their formula."""
    first, end = segment.bounds[b, kv_head].tolist()

    def numbers(codes: Tensor, bits: int, params: Tensor | None, channels: Tensor | None) -> Tensor:
        found = codes[b, kv_head, first:end].double()
        if bits < 8:
            found = torch.cat([found.div(2**place, rounding_mode="floor") % 2**bits for place in range(0, 8, bits)], 1)
        if params is not None:
            own = params[b, kv_head, first:end].double()
            found = found * own[:, :1] + (own[:, 1:] if bits < 8 else 0)
        return (
            found if channels is None else channels[b, kv_head, 0].double() * found + channels[b, kv_head, 1].double()
        )

    return (
        numbers(segment.keys, segment.key_bits, segment.key_params, segment.key_channels),
        numbers(segment.values, segment.value_bits, segment.value_params, segment.value_channels),
    )


@dataclass(frozen=True)
class _Part:
    """A segment of a case: slots, bits of keys and values, bounds ``[B][Hkv][2]`` (all slots), per-channel keys."""

    slots: int
    key_bits: int
    value_bits: int
    bounds: list[list[list[int]]] | None = None
    by_channel: bool = False


def _segment(part: _Part, shape: tuple[int, int, int], generator: torch.Generator, dtype: torch.dtype) -> Segment:
    """Random codes and parameters; what is out of bounds is not a number."""
    batch, heads, width = shape
    bounds = torch.tensor([[[0, part.slots]] * heads] * batch if part.bounds is None else part.bounds)
    slots = torch.arange(part.slots)
    missing = ((slots < bounds[..., :1]) | (slots >= bounds[..., 1:]))[..., None]

    def side(bits: int, by_channel: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if bits == 16:  # of the queries' type, or as sinks of an older cache
            floats = torch.randn(batch, heads, part.slots, width, generator=generator).masked_fill(missing, torch.nan)
            return floats.to(dtype if part.slots == 1 else torch.float16), None, None
        least, most, share = (-127, 128, 1) if bits == 8 else (0, 256, 8 // bits)
        # As an arena holds them: room for more slots than there are.
        codes = torch.randint(least, most, (batch, heads, part.slots + 3, width // share), generator=generator)
        codes = codes.to(torch.int8 if bits == 8 else torch.uint8)[:, :, : part.slots]
        step = (1 + torch.rand(batch, heads, part.slots, 1, generator=generator)) * 2 / 2**bits
        if bits == 8:
            return codes, step.masked_fill(missing, torch.nan).half(), None
        zero = torch.randn(step.shape, generator=generator) / 4 - step * 2 ** (bits - 1)
        c = (torch.randn(batch, heads, 1, width, generator=generator) / 2).exp()
        mu = torch.randn(c.shape, generator=generator) / 4
        if by_channel:
            return codes, None, torch.cat([c * 2 / 2**bits, mu - c], 2)
        return codes, torch.cat([step, zero], 3).masked_fill(missing, torch.nan).half(), torch.cat([c, mu], 2).half()

    keys, key_params, key_channels = side(part.key_bits, part.by_channel)
    values, value_params, value_channels = side(part.value_bits, False)
    return Segment(
        keys, values, part.key_bits, part.value_bits, key_params, value_params, key_channels, value_channels,
        bounds.int(), int((bounds[..., 1] - bounds[..., 0]).max()) if bounds.numel() else 0,
    )  # fmt: skip


def _case(
    name: str,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    *parts: _Part,
    batch: int = 1,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """``heads`` (H, Hkv), ``sizes`` (R, D)."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        q = torch.randn(batch, sizes[0], heads[0], sizes[1], generator=generator).to(dtype).transpose(1, 2)
        segments = tuple(_segment(part, (batch, heads[1], sizes[1]), generator, dtype) for part in parts)
        return q, segments, sizes[1] ** -0.5

    return Case(name, make, dtypes)


_WIDE = (torch.float32,)
CASES = (
    _case("decode", (3, 1), (1, 64), _Part(65, 4, 4), _Part(200, 2, 2), _Part(63, 8, 8), _Part(4, 16, 16),
          _Part(1, 16, 16)),
    _case("one-slot", (4, 1), (3, 80), _Part(1, 4, 2)),
    _case("keys-by-channel", (8, 1), (1, 128), _Part(64, 2, 2, by_channel=True), _Part(5, 4, 4, by_channel=True)),
    _case("ragged", (2, 2), (1, 96), _Part(66, 4, 2, [[[0, 66], [5, 5]], [[64, 66], [3, 60]]]),
          _Part(9, 8, 8, [[[0, 9], [2, 2]], [[9, 9], [0, 1]]]), batch=2),
    _case("chunk", (1, 1), (70, 64), _Part(200, 4, 4), _Part(70, 2, 2, [[[6, 70]]])),
    _case("splits", (1, 1), (2, 64), _Part(600, 2, 4)),
    _case("wide-head", (1, 1), (1, 256), _Part(65, 2, 4)),
    _case("empty-segment", (2, 1), (1, 64), _Part(8, 2, 2, [[[4, 4]]]), _Part(3, 4, 16), dtypes=_WIDE),
    _case("nothing", (2, 1), (2, 64), _Part(0, 4, 4), dtypes=_WIDE),
    _case("no-segment", (2, 1), (1, 64), dtypes=_WIDE),
    _case("no-rows", (2, 1), (0, 64), _Part(3, 4, 4), dtypes=_WIDE),
)  # fmt: skip


def _on_no_device(width: int, bits: tuple[int, int], by_channel: bool) -> Segment:
    """A segment of 8 KV heads and 32768 slots without data."""

    def empty(size: int, dtype: torch.dtype, slots: int = 32768) -> Tensor:
        return torch.empty(1, 8, slots, size, dtype=dtype, device="meta")

    def codes(bits: int) -> Tensor:
        return empty(width * min(bits, 8) // 8, {8: torch.int8, 16: torch.float16}.get(bits, torch.uint8))

    def params(bits: int) -> Tensor | None:
        return None if bits == 16 else empty(1 if bits == 8 else 2, torch.float16)

    channels = empty(width, torch.float16, 2) if bits[0] < 8 else None
    return Segment(
        codes(bits[0]), codes(bits[1]), *bits, None if by_channel else params(bits[0]), params(bits[1]),
        channels, channels, empty(2, torch.int32)[:, :, 0], 32768,
    )  # fmt: skip


def _compiled(
    width: int, bits: tuple[int, int], dtype: torch.dtype, limits: Limits, rows: int = 1, by_channel: bool = False
) -> Compiled:
    """32 query heads of 8 KV heads; ``rows`` 0 for the kernel that merges."""

    def launch() -> Launch:
        q = torch.empty(1, 32, max(1, rows), width, dtype=dtype, device="meta")
        return triton.launches(q, [_on_no_device(width, bits, by_channel)], 0.1)[1][0 if rows else -1]

    kind = "merge" if not rows else f"k{bits[0]}v{bits[1]}{'-by-channel' if by_channel else ''}-r{rows}"
    return Compiled(f"{kind}-d{width}-{str(dtype).removeprefix('torch.')}", launch, limits)


_half, _brain = torch.float16, torch.bfloat16
_decode = Limits(registers=128, conversions=2)  # four programs of 4 warps a multiprocessor; log2 converts an exponent
_rows = Limits(registers=255, conversions=8, wgmma=True)


def _native(build: str, q: Tensor, segments: tuple[Segment, ...], scaling: float) -> tuple[Tensor, Tensor]:
    library = native.built(build)
    assert library is not None
    return cpu.segment_attention(q, segments, scaling, library)


SPEC = OpSpec(
    name="segment_attention",
    public=op.segment_attention,
    reference=reference.segment_attention,
    exact=_exact,
    triton=triton.segment_attention,
    cpu=_native,
    cases=CASES,
    configurations=(
        _compiled(128, (4, 4), _half, _decode),
        _compiled(128, (2, 2), _half, _decode),
        _compiled(128, (4, 2), _brain, _decode),
        _compiled(64, (2, 2), _half, _decode, by_channel=True),
        _compiled(128, (8, 8), _half, _decode),
        _compiled(128, (16, 16), _brain, _decode),
        _compiled(256, (2, 2), _half, Limits(registers=168, conversions=2)),
        _compiled(64, (4, 4), torch.float32, Limits(mma=False)),
        _compiled(128, (4, 4), _half, _rows, rows=512),
        _compiled(64, (2, 2), _half, _rows, rows=512),
        _compiled(128, (4, 4), _half, Limits(registers=64, mma=False), rows=0),
    ),
)
