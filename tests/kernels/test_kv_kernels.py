"""What packed codes and attention over them must keep, beyond the four proofs of every operation."""

from dataclasses import replace

import pytest
import torch
from compress.kernels.kv_pack import kv_pack, kv_unpack
from compress.kernels.kv_pack.reference import pack, unpack
from compress.kernels.segment_attention import Segment, merge, segment_attention
from torch import Tensor


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _bounds(x: Tensor, first: int, end: int) -> Tensor:
    return torch.tensor([first, end], dtype=torch.int32).repeat(*x.shape[:2], 1)


def _separable(x: Tensor) -> Tensor:
    return torch.stack([x.abs().amax(2).sqrt(), x.mean(2)], 2).half()


def _packed(keys: Tensor, values: Tensor, key_bits: int = 4, value_bits: int = 2) -> Segment:
    key_channels, value_channels = _separable(keys), _separable(values)
    key_codes, key_params = kv_pack(keys, key_bits, key_channels)
    codes, params = kv_pack(values, value_bits, value_channels, clip=True)
    count = keys.shape[2]
    bounds = _bounds(keys, 0, count)
    return Segment(
        key_codes, codes, key_bits, value_bits, key_params, params, key_channels, value_channels, bounds, count
    )


def _plain(keys: Tensor, values: Tensor, key_channels: Tensor | None = None) -> Segment:
    count = keys.shape[2]
    return Segment(keys, values, 16, 16, None, None, key_channels, None, _bounds(keys, 0, count), count)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_packing_is_a_bijection(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.shape[-1] == width * bits // 8
    assert torch.equal(unpack(packed, bits), codes)
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack(unpack(every_byte, bits), bits), every_byte)


def test_layout_of_split_halves() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [j | (j + 4) << 4 for j in range(4)]
    assert pack(codes % 4, 2).tolist() == [0b10_00_10_00, 0b11_01_11_01]


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_error_is_at_most_half_a_step(bits: int) -> None:
    x = _random(2, 2, 40, 64) * _random(2, 2, 1, 64, seed=1).exp()
    channels = _separable(x)
    codes, params = kv_pack(x, bits, channels)
    c, step, zero = channels[:, :, :1].float(), params[..., :1].float(), params[..., 1:].float()
    stored = 2.0**-11 * ((2**bits - 1) * step + zero.abs())  # s and z are float16: the range's ends may be cut off
    error = (kv_unpack(codes, params, bits, channels) - x).abs()
    assert (error <= c * (step / 2 + stored) + 1e-5 * x.abs()).all()


def test_clipping_only_improves() -> None:
    x = _random(1, 2, 60, 64) ** 3
    errors = [(kv_unpack(*kv_pack(x, 2, clip=clip), 2) - x).square().sum(-1) for clip in (False, True)]
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_eight_bits_of_zeros() -> None:
    codes, params = kv_pack(torch.zeros(1, 1, 2, 8), 8)
    assert not codes.any()
    assert not params.any()


def test_constant_tokens_stay_finite() -> None:
    x = torch.full((1, 1, 3, 16), 0.1)
    assert (kv_unpack(*kv_pack(x, 2, clip=True), 2) - x).abs().max() < 1e-4


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (2, 2), (4, 2), (8, 8)])
def test_folding_equals_attention_over_what_was_unpacked(key_bits: int, value_bits: int) -> None:
    """The public path, folded where it isn't the reference, against softmax over dequantized tensors."""
    q, (keys, values) = _random(2, 6, 3, 64, seed=1), _random(2, 2, 2, 65, 64)
    if key_bits == 8:
        (key_codes, key_params), (codes, params) = kv_pack(keys, 8), kv_pack(values, 8)
        segment = Segment(key_codes, codes, 8, 8, key_params, params, None, None, _bounds(keys, 0, 65), 65)
    else:
        segment = _packed(keys, values, key_bits, value_bits)
    k = kv_unpack(segment.keys, segment.key_params, key_bits, segment.key_channels).repeat_interleave(3, 1)
    v = kv_unpack(segment.values, segment.value_params, value_bits, segment.value_channels).repeat_interleave(3, 1)
    scores = q @ k.mT * 0.125
    out, lse = segment_attention(q, [segment], 0.125)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_order_inside_a_segment_does_not_matter() -> None:
    q, (keys, values) = _random(1, 4, 1, 64, seed=1), _random(2, 1, 2, 70, 64)
    segment = _packed(keys, values)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    names = ("keys", "values", "key_params", "value_params")
    shuffled = replace(segment, **{name: getattr(segment, name)[:, :, order] for name in names})
    out, again = segment_attention(q, [segment], 0.2)[0], segment_attention(q, [shuffled], 0.2)[0]
    torch.testing.assert_close(out, again, atol=1e-5, rtol=0)


def test_centred_keys_give_the_same_attention() -> None:
    """Keys stored without their mean, which the channel vectors give back, beside keys stored as they are."""
    q, (keys, values) = _random(1, 4, 2, 64, seed=1), _random(2, 1, 2, 40, 64)
    keys = keys + 3 * _random(1, 2, 1, 64, seed=3)
    mean = keys.mean(2)
    channels = torch.stack([torch.ones_like(mean), mean], 2)
    rest = _plain(keys[:, :, 30:], values[:, :, 30:])
    centred = _plain(keys[:, :, :30] - mean[:, :, None], values[:, :, :30], channels)
    plain = _plain(keys[:, :, :30], values[:, :, :30])
    found, wanted = segment_attention(q, [centred, rest], 0.1), segment_attention(q, [plain, rest], 0.1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_parts_merge_to_the_whole() -> None:
    q, (keys, values) = _random(1, 4, 3, 64, seed=1), _random(2, 1, 2, 90, 64)
    whole = _packed(keys, values)
    parts = [replace(whole, bounds=_bounds(keys, *pair), longest=pair[1] - pair[0]) for pair in ((0, 37), (37, 90))]
    wanted = segment_attention(q, [whole], 0.2)
    torch.testing.assert_close(segment_attention(q, parts, 0.2), wanted, atol=1e-5, rtol=0)
    merged = merge([segment_attention(q, [part], 0.2) for part in parts])
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=0)


def test_merging_nothing_seen() -> None:
    nothing = segment_attention(_random(1, 2, 3, 16), [], 0.2)
    out, lse = merge([nothing, nothing])
    assert not out.any()
    assert (lse == -torch.inf).all()
    seen = segment_attention(_random(1, 2, 3, 16), [_plain(*_random(2, 1, 1, 5, 16))], 0.2)
    torch.testing.assert_close(merge([nothing, seen, nothing]), seen)
    with pytest.raises(ValueError, match="no partial results"):
        merge([])


def test_a_width_that_does_not_pack_is_named() -> None:
    with pytest.raises(ValueError, match="D=20"):
        kv_pack(torch.zeros(1, 1, 2, 20), 4)


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="bits=3"):
        kv_pack(x, 3)
    with pytest.raises(ValueError, match="channels must be"):
        kv_pack(x, 4, torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="channels must be None"):
        kv_pack(x, 8, torch.zeros(1, 2, 2, 16))
    with pytest.raises(ValueError, match="steps and minima"):
        kv_pack(x, 4, per_token=False)
    with pytest.raises(ValueError, match="longest=4"):
        replace(_plain(x, x), longest=4)
    with pytest.raises(ValueError, match="different slots"):
        _plain(x, x[:, :, :2])
    with pytest.raises(ValueError, match="key_bits=3"):
        replace(_plain(x, x), key_bits=3)
    with pytest.raises(ValueError, match="don't fit segment 0"):
        segment_attention(torch.zeros(1, 3, 1, 16), [_plain(x, x)], 1.0)
