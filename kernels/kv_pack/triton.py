"""Quantize and pack keys or values on a GPU: a block of tokens of one head a program, everything in registers.

A token's channels are held as ``[D / parts, parts]``, the parts being those that share a byte, so that packing is a
sum over the last dimension. Rounding adds 1.5 * 2^23: the sum's low bits are the code, to the nearest, halves to even,
with no conversion instruction. A token's NaN reaches its parameters, as in the reference.
"""

import torch
from compress.kernels.kv_pack.reference import CLIP_RATIOS, SMALLEST_SCALE
from compress.kernels.triton_support import Launch, jit, tl
from torch import Tensor

ELEMENTS = 2048  # a program
CLIPPED_ELEMENTS = 512  # a search takes more registers


@jit
def _smaller(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _rounded(y, low, high, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest codes in 1.5 * 2^23 + code for a range of every token, and its step and zero point as stored."""
    step = _larger(tl.div_rn(high - low, tl.full(low.shape, LARGEST, tl.float32)), SMALLEST)
    step = step.to(tl.float16).to(tl.float32)
    zero = low.to(tl.float16).to(tl.float32)
    steps = tl.broadcast_to(step[:, None, None], y.shape)
    numbers = tl.div_rn(y - zero[:, None, None], steps)
    return tl.minimum(tl.maximum(numbers, 0.0), LARGEST) + 12582912.0, step, zero


@jit
def _squared_error(y, codes, step, zero, c, inside):  # type: ignore[no-untyped-def]
    """What a token loses, in x: ``sum_i (c_i (s code_i + z - y_i))^2``."""
    lost = c * (step[:, None, None] * (codes - 12582912.0) + zero[:, None, None] - y)
    return tl.sum(tl.sum(tl.where(inside, lost * lost, 0.0), 2), 1)


@jit(do_not_specialize=["T"])
def _pack(  # type: ignore[no-untyped-def]
    x_ptr, channels_ptr, codes_ptr, params_ptr, x_batch, x_head, x_token, channels_batch, channels_head, T,
    HEADS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr,
    PER_TOKEN: tl.constexpr, RATIOS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of tokens, H, B]: codes ``[B, H, T, D BITS / 8]`` and params ``[B, H, T, 2]``, or 1 for 8 bits."""
    PARTS: tl.constexpr = 8 // BITS
    J: tl.constexpr = D // PARTS
    LARGEST: tl.constexpr = 127.0 if BITS == 8 else (1 << BITS) - 1.0
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, j = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_J)
    part = tl.arange(0, PARTS)
    d = part[None, None, :] * J + j[None, :, None]
    real = j[None, :, None] < J
    inside = (t[:, None, None] < T) & real
    tokens = x_ptr + batch * x_batch + head * x_head + t.to(tl.int64)[:, None, None] * x_token
    y = tl.load(tokens + d, mask=inside, other=0.0).to(tl.float32)
    c = tl.full([1, BLOCK_J, PARTS], 1.0, tl.float32)
    if channels_ptr is not None:
        channels_ptr += batch * channels_batch + head * channels_head
        c = tl.load(channels_ptr + d, mask=real, other=1.0).to(tl.float32)
        mu = tl.load(channels_ptr + D + d, mask=real, other=0.0).to(tl.float32)
        y = tl.div_rn(y - mu, tl.broadcast_to(c, y.shape))
    row = (batch * HEADS + head) * T + t
    if BITS == 8:
        largest = tl.reduce(tl.reduce(tl.abs(y), 2, _larger), 1, _larger)
        step = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)).to(tl.float16)
        tl.store(params_ptr + row, step, mask=t < T)
        divisor = tl.where(step == 0, 1.0, step.to(tl.float32))[:, None, None]
        numbers = tl.where((step == 0)[:, None, None], 0.0, tl.div_rn(y, tl.broadcast_to(divisor, y.shape)))
        codes = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST) + 12582912.0
    elif PER_TOKEN:
        low = tl.reduce(tl.reduce(tl.where(real, y, float("inf")), 2, _smaller), 1, _smaller)
        high = tl.reduce(tl.reduce(tl.where(real, y, float("-inf")), 2, _larger), 1, _larger)
        codes, step, zero = _rounded(y, low, high, LARGEST, SMALLEST)
        if len(RATIOS) > 1:
            least = _squared_error(y, codes, step, zero, c, real)
            middle = (low + high) * 0.5
            for number in tl.static_range(1, len(RATIOS)):
                reach = (high - low) * (0.5 * RATIOS[number])
                found, found_step, found_zero = _rounded(y, middle - reach, middle + reach, LARGEST, SMALLEST)
                error = _squared_error(y, found, found_step, found_zero, c, real)
                better = error < least
                least = tl.where(better, error, least)
                codes = tl.where(better[:, None, None], found, codes)
                step = tl.where(better, found_step, step)
                zero = tl.where(better, found_zero, zero)
        tl.store(params_ptr + row * 2, step.to(tl.float16), mask=t < T)
        tl.store(params_ptr + row * 2 + 1, zero.to(tl.float16), mask=t < T)
    else:
        codes = tl.minimum(tl.maximum(y, 0.0), LARGEST) + 12582912.0
    bits = (codes.to(tl.int32, bitcast=True) & 255) << (part * BITS)[None, None, :]
    places = codes_ptr + row[:, None].to(tl.int64) * J + j[None, :]
    tl.store(places, tl.sum(bits, 2).to(codes_ptr.dtype.element_ty), mask=(t[:, None] < T) & (j[None, :] < J))


def kv_pack(
    x: Tensor, bits: int, channels: Tensor | None = None, clip: bool = False, per_token: bool = True
) -> tuple[Tensor, Tensor | None]:
    """See :func:`compress.kernels.kv_pack.kv_pack`; on a GPU."""
    outputs, launch = launches(x, bits, channels, clip, per_token)
    launch.start()
    return outputs


def launches(
    x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool
) -> tuple[tuple[Tensor, Tensor | None], Launch]:
    """Codes ``[B, H, T, D * bits / 8]`` and parameters, not yet filled, and the launch that fills them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    channels = None if channels is None else channels.contiguous()
    batch, heads, count, width = x.shape
    parts = 8 // bits
    codes = torch.empty(
        batch, heads, count, width // parts, dtype=torch.int8 if bits == 8 else torch.uint8, device=x.device
    )
    params = None
    if bits == 8 or per_token:
        params = torch.empty(batch, heads, count, 1 if bits == 8 else 2, dtype=torch.float16, device=x.device)
    block_j = 1 << (width // parts - 1).bit_length()
    block_t = max(1, (CLIPPED_ELEMENTS if clip else ELEMENTS) // (block_j * parts))
    arguments = {
        "x_ptr": x, "channels_ptr": channels, "codes_ptr": codes, "params_ptr": params,
        "x_batch": x.stride(0), "x_head": x.stride(1), "x_token": x.stride(2),
        "channels_batch": heads * 2 * width, "channels_head": 2 * width, "T": count,
    }  # fmt: skip
    constexprs = {
        "HEADS": heads, "D": width, "BITS": bits, "BLOCK_J": block_j, "BLOCK_T": block_t, "PER_TOKEN": per_token,
        "RATIOS": CLIP_RATIOS if clip else CLIP_RATIOS[:1], "SMALLEST": SMALLEST_SCALE,
    }  # fmt: skip
    return (codes, params), Launch(_pack, (-(-count // block_t), heads, batch), arguments, constexprs, 4, 1)
