"""KIVI's cache against a plain definition, its bytes against the published layout."""

import pytest
import torch
from compress.evalsuite.efficiency import allocated
from compress.evalsuite.scan import scan
from compress.evalsuite.sliding import Feed, Windows
from models import build_model
from transformers import DynamicCache

from compress.kv.kivi import GROUP, KiviCache, KiviFormat, KiviLayer

WIDTH, HEADS = 64, 2


def states(tokens, seed=0, batch=2, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, tokens, width, generator=generator) for _ in range(2))
    return keys * torch.linspace(0.1, 4, width), values + 0.5


def rounded(x, bits):
    """Asymmetric rounding of the last dimension with float16 parameters, from the paper's formula."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((x - zero) / step).round().clamp(0, 2**bits - 1) * step + zero


def expected(keys, values, format):
    """Keys and values as a later call is shown them, all of them given before in one call."""
    tokens, width = keys.shape[2:]
    count = (tokens - format.recent[0]) // format.residual * format.residual
    groups = keys[:, :, :count].half().float().unflatten(2, (-1, GROUP)).transpose(-1, -2)
    keys = torch.cat([rounded(groups, format.bits).transpose(-1, -2).flatten(2, 3), keys[:, :, count:].half()], 2)
    count = max(0, tokens - format.residual - format.recent[1])
    groups = values[:, :, :count].half().float().unflatten(3, (-1, min(width, GROUP)))
    return keys, torch.cat([rounded(groups, format.bits).flatten(3), values[:, :, count:].half()], 2)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("recent", [(0, 0), (40, 7)])
@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_equals_a_plain_definition(bits, recent, tokens):
    format = KiviFormat(bits, 64, recent)
    layer = KiviLayer(format)
    keys, values = states(tokens)
    assert layer.update(keys, values)[0] is not keys
    more = states(3, seed=1)
    found = layer.update(*more)
    for own, wanted, new in zip(found, expected(keys, values, format), more, strict=True):
        assert torch.allclose(own[:, :, :tokens], wanted.float(), atol=2e-3)
        assert torch.equal(own[:, :, tokens:], new)
    assert layer.get_seq_length() == tokens + 3


def test_a_prompt_sees_itself_exactly():
    layer = KiviLayer(KiviFormat(2, 32))
    keys, values = states(100)
    assert all(torch.equal(own, given) for own, given in zip(layer.update(keys, values), (keys, values), strict=True))


def test_codes_never_change_and_come_in_order():
    layer = KiviLayer(KiviFormat(2, 32))
    layer.update(*states(96))
    before = layer.packed_keys.codes.clone(), layer.packed_values.codes.clone()
    for step in range(70):
        layer.update(*states(1, seed=step))
    assert torch.equal(layer.packed_keys.codes[:, :, :96], before[0])
    assert torch.equal(layer.packed_values.codes[:, :, :64], before[1])
    assert layer.packed_keys.tokens == 160  # 166 // 32 * 32
    assert layer.packed_values.tokens == 166 - 32
    assert layer.get_seq_length() == 166


def test_one_call_or_many_hold_the_same():
    keys, values = states(130)
    whole, parts = KiviLayer(KiviFormat(4, 32)), KiviLayer(KiviFormat(4, 32))
    whole.update(keys, values)
    for piece in (slice(0, 77), slice(77, 78), slice(78, 130)):
        parts.update(keys[:, :, piece], values[:, :, piece])
    for one, other in ((whole.packed_keys, parts.packed_keys), (whole.packed_values, parts.packed_values)):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.params, other.params)


@pytest.mark.parametrize(("bits", "each"), [(2, 3.0), (4, 5.0)])
def test_bytes_are_those_of_the_published_layout(bits, each):
    """A group of 32 numbers has a step and a minimum of 16 bits: one bit more a number."""
    layer = KiviLayer(KiviFormat(bits, 128))
    keys, values = states(2048 + 64, batch=1)
    layer.update(keys, values)
    numbers = HEADS * WIDTH
    packed = numbers * (2048 + 2048 - 64) * each / 8
    waiting = numbers * (64 + 128) * 2
    found = layer.nbytes()
    assert found.stored == found.allocated == packed + waiting
    assert found.payload == numbers * (4096 - 64) * bits / 8 + waiting
    assert allocated(layer).nbytes == found.allocated


def test_narrow_heads_and_constant_channels():
    layer = KiviLayer(KiviFormat(2, 32))
    keys, values = states(64, width=24)
    keys[..., 3], values[:, :, 5] = 7.0, 0.0
    layer.update(keys, values)
    shown, seen = layer.update(*states(1, width=24))
    assert shown.isfinite().all()
    assert torch.allclose(shown[:, :, :64, 3], torch.tensor(7.0), atol=1e-2)
    assert torch.allclose(seen[:, :, 5], torch.tensor(0.0), atol=1e-3)
    with pytest.raises(ValueError, match="head_dim 20 can't be packed"):
        KiviLayer(KiviFormat(2)).update(*states(4, width=20))


def test_a_model_answers_with_it_and_sliding_layers_stay():
    model = build_model("llama")
    ids = torch.randint(3, 300, (1, 256), generator=torch.Generator().manual_seed(0))[0]
    cut = Windows(128, None, 2, Feed(96, 8))
    (dense, four, two) = (
        sum(x.nll for x in scan(model, ids, cut, cache=make))
        for make in (
            DynamicCache,
            lambda: KiviCache(model.config, KiviFormat(4, 32)),
            lambda: KiviCache(model.config, KiviFormat(2, 32)),
        )
    )
    assert 0 < abs(four - dense) < abs(two - dense)
    sliding = build_model("qwen2")
    kinds = [type(layer).__name__ for layer in KiviCache(sliding.config, KiviFormat(4)).layers]
    assert kinds == ["KiviLayer", "DynamicSlidingWindowLayer", "DynamicSlidingWindowLayer"]


def test_beams_take_codes_with_them():
    layer = KiviLayer(KiviFormat(2, 32))
    keys, values = (torch.cat(parts) for parts in zip(states(100), states(100, seed=1), strict=True))
    layer.update(keys, values)
    before = layer.update(*(x[:, :, :1] for x in (keys, values)))[0]
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices([0, 3])
    after = layer.update(*(x[[1, 0], :, :1] for x in (keys, values)))[0]
    assert torch.equal(after[:, :, :100], before[[1, 0], :, :100])
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes().allocated == 0
