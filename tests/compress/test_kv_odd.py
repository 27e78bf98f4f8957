"""A packed layer used in ways that aren't a prompt and an answer."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from test_kv_layer import KV_HEADS, SCALE, WIDTH, Stream, feed, held_tokens, layer, part, turned

from compress.plan import KVBits


def test_classes_that_were_empty_at_first_keep_the_vectors_of_the_others() -> None:
    """A row with few tokens has no salient one at first; when it has, the vectors that its other tokens use stay."""
    held, stream = layer(first_flush=60, window_min=16), Stream(batch=2)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, :281] = False
    sent = [stream(300)]
    feed(held, sent[0], mask)
    before = held_tokens(held, 0, 0)
    for _ in range(80):
        sent.append(stream(1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        feed(held, sent[-1], mask)
    packed = int(part(held).store.packed()[0, 0])
    assert packed
    keys = turned(held, torch.cat([sent[0][1][0, 0, 281:], *(states[1][0, 0] for states in sent[1:])]))
    found = held_tokens(held, 0, 0)[0]
    assert len(before[0]) == 19
    assert float((found - keys).norm(dim=1).max()) < 2.0  # 2 bits of a normal vector of 16: about 1.3


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_a_copy_goes_on_by_itself(twin: Any) -> None:
    held, stream = layer(), Stream()
    feed(held, stream(90))
    feed(held, stream(1))
    other, states = twin(held), stream(1)
    expected = feed(held, states)
    for _ in range(5):
        feed(held, stream(1))
    torch.testing.assert_close(feed(other, states), expected)
    assert other.get_seq_length() == 92


@pytest.mark.parametrize("then", ["decode", "chunk", "crop", "reorder"])
def test_a_prompt_in_inference_mode_is_gone_on_with_outside_of_it(then: str) -> None:
    held, stream = layer(), Stream()
    alike = layer()
    prompt, states = stream(90), stream(9)
    with torch.inference_mode():
        feed(held, prompt)
        feed(held, (prompt[0][:, :, :1], prompt[1][:, :, :1], prompt[2][:, :, :1]))
    feed(alike, prompt)
    feed(alike, (prompt[0][:, :, :1], prompt[1][:, :, :1], prompt[2][:, :, :1]))
    for own in (held, alike):
        if then == "crop":
            own.crop(-3)
        elif then == "reorder":
            own.reorder_cache(torch.tensor([0]))
    count = 9 if then == "chunk" else 1
    new = tuple(x[:, :, :count] for x in states)
    with torch.no_grad():
        for _ in range(40):
            out, expected = feed(held, new), feed(alike, new)  # type: ignore[arg-type]
            torch.testing.assert_close(out, expected)


def test_a_mask_that_hides_earlier_tokens_later_is_refused() -> None:
    held, stream = layer(), Stream(batch=2)
    feed(held, stream(80))
    mask = torch.ones(2, 81, dtype=torch.bool)
    mask[1, 10] = False
    with pytest.raises(ValueError, match="hides or shows earlier tokens"):
        feed(held, stream(1), mask)


@pytest.mark.parametrize("shown", [None, torch.ones(2, 81, dtype=torch.bool)])
def test_a_mask_that_shows_earlier_padding_is_refused(shown: torch.Tensor | None) -> None:
    held, stream = layer(), Stream(batch=2)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1, :10] = False
    feed(held, stream(80), mask)
    with pytest.raises(ValueError, match="hides or shows earlier tokens"):
        feed(held, stream(1), shown)


def test_a_mask_of_another_length_is_refused() -> None:
    held, stream = layer(), Stream()
    feed(held, stream(80))
    with pytest.raises(ValueError, match=r"has 1 columns.* 81"):
        feed(held, stream(1), torch.ones(1, 1, dtype=torch.bool))


def test_beams_do_not_take_more_bytes_for_what_their_classes_share() -> None:
    held, stream = layer(), Stream(batch=2)
    feed(held, stream(90))
    before = held.nbytes()
    held.reorder_cache(torch.tensor([1, 0]))
    assert held.nbytes() == before


def test_a_class_that_nobody_is_in_can_be_unpacked() -> None:
    held, stream = layer(bits=KVBits(high=(4, 4), low=(2, 2), ratio=0.01)), Stream()
    feed(held, stream(60))
    assert len(held_tokens(held, 0, 0)[0]) == 60


def test_sinks_beyond_the_16_bit_type_are_refused() -> None:
    held, (query, key, value) = layer(rotate=False), Stream()(90)
    key[0, 1, 2, 3] = 1e5
    with pytest.raises(ValueError, match="beyond the range"):
        feed(held, (query, key, value))


@pytest.mark.parametrize("tokens", [1, 3])
def test_drift_is_not_judged_by_a_token_or_two(tokens: int) -> None:
    """A first flush of next to nothing gives no error to compare with; nor does a later one begin an epoch."""
    held, stream = layer(first_flush=1, window_min=16, flush=tokens, rotate=False), Stream()
    feed(held, stream(16 + tokens + 4))
    for _ in range(60):
        feed(held, stream(1))
    assert len(part(held).store.arenas["low"].epochs) == 1


def test_drift_of_any_sequence_begins_another_epoch() -> None:
    held, stream = layer(rotate=False), Stream(batch=2)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, :9] = False
    feed(held, stream(100), mask)
    moved = torch.zeros(2, KV_HEADS, 1, WIDTH)
    moved[1] = 30 * torch.randn(WIDTH, generator=stream.generator)
    for _ in range(70):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        query, key, value = stream(1)
        feed(held, (query, key + moved, value), mask)
    assert len(part(held).store.arenas["low"].epochs) > 1


def test_the_newest_token_attends_to_itself_in_full_precision() -> None:
    held, stream = layer(), Stream()
    feed(held, stream(90))
    query, key, value = stream(1)
    key = 40 * query[:, ::3].contiguous()  # it sees next to nothing but itself
    out = feed(held, (query, key, value))
    torch.testing.assert_close(out[0, 0, 0], value[0, 0, 0], atol=1e-5, rtol=1e-5)
    assert SCALE == WIDTH**-0.5


def test_padding_in_a_later_chunk_gives_nothing() -> None:
    held, stream = layer(), Stream(batch=2)
    feed(held, stream(90))
    mask = torch.ones(2, 97, dtype=torch.bool)
    mask[1, 90:93] = False
    out = feed(held, stream(7), mask)
    assert not out[1, :, :3].any()
    assert out[0].any()


def test_formats_of_one_layer_are_told_apart() -> None:
    format = part(layer()).format
    assert format != dataclasses.replace(format, bits=KVBits(ratio=1.0))
