"""One packed layer against a plain definition: what it holds is unpacked, and attended to row by row."""

import dataclasses
import hashlib
import math
from typing import Any

import pytest
import torch
from compress.evalsuite.efficiency import allocated
from torch import Tensor

from compress.kv.arena import Place
from compress.kv.layer import Cluster, Handle, PlanLayer
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.rotation import Rotation
from compress.kv.saliency import probe_rows, prompt_mass, salient, witnesses
from compress.plan import KVBits, Packing

HEADS, KV_HEADS, WIDTH = 6, 2, 16
SCALE = WIDTH**-0.5
PLUS: dict[str, Any] = {
    "key_scheme": "token", "center": True, "rotate": True, "key_cst": True, "value_cst": True, "clip": True,
    "sinks": 4, "window_bits": 8, "window_min": 16, "flush": 32, "first_flush": 48,
    "probe_recent": 0.05, "probe_random": 0.05, "probe_cap": 32, "normalizer": "probes", "seed": 0,
}  # fmt: skip
PAPER: dict[str, Any] = PLUS | {
    "key_scheme": "channel", "center": False, "rotate": False, "key_cst": False, "clip": False,
    "sinks": 0, "window_bits": 16, "window_min": 0, "flush": 20, "first_flush": 1, "probe_cap": 0,
}  # fmt: skip
KINDS = {"plus": PLUS, "paper": PAPER}


def layer(kind: str = "plus", bits: KVBits | None = None, **changes: Any) -> PlanLayer:
    packing = Packing(**(KINDS[kind] | changes))
    turn = Rotation(WIDTH) if packing.rotate else None
    format = PackedFormat(packing, bits or KVBits(high=(4, 4), low=(2, 2), ratio=0.3), 1, turn)
    return PlanLayer(1, [Cluster(None, PackedPart(format))])


def part(held: PlanLayer) -> PackedPart:
    (cluster,) = held.clusters
    assert isinstance(cluster.part, PackedPart)
    return cluster.part


class Stream:
    """Random queries, keys and values of one sequence after the other, as a model would send them."""

    def __init__(self, batch: int = 1, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = batch

    def __call__(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        def random(heads: int) -> Tensor:
            return torch.randn(self.batch, heads, tokens, WIDTH, generator=self.generator)

        return random(HEADS), random(KV_HEADS) + 0.5, random(KV_HEADS)


def feed(held: PlanLayer, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
    query, key, value = states
    handle, other = held.update(key, value)
    assert isinstance(handle, Handle)
    assert handle is other
    return held.attend(query, mask, SCALE)


def held_tokens(held: PlanLayer, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values in the order of the tokens, in the layer's rotated space."""
    keys, values = part(held).store.unpacked(row, head)
    window = part(held).window.tokens()
    start = int(part(held).window.first[row])
    return torch.cat([keys, window.keys[row, head, start:]]), torch.cat([values, window.values[row, head, start:]])


def with_itself(held: PlanLayer, states: tuple[Tensor, Tensor, Tensor], row: int, head: int) -> tuple[Tensor, Tensor]:
    """As `held_tokens`, with the newest token as it came."""
    keys, values = held_tokens(held, row, head)
    own = turned(held, states[1][row, head]), states[2][row, head]
    return torch.cat([keys[:-1], own[0]]), torch.cat([values[:-1], own[1]])


def attention(query: Tensor, keys: Tensor, values: Tensor, seen: int) -> Tensor:
    """One row over the first tokens, in float64."""
    scores = keys[:seen].double() @ query.double() * SCALE
    return (scores.softmax(0) @ values[:seen].double()).float()


def turned(held: PlanLayer, query: Tensor) -> Tensor:
    rotation = part(held).format.rotation
    return query if rotation is None else rotation(query)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_decoding_attends_to_what_is_held(kind: str, ratio: float) -> None:
    held, stream = layer(kind, KVBits(high=(4, 4), low=(2, 2), ratio=ratio)), Stream(batch=2)
    feed(held, stream(70))
    for _ in range(50):
        states = stream(1)
        before = part(held).store.packed().sum()
        out = feed(held, states)
        if part(held).store.packed().sum() != before:
            continue  # this token's window was packed after it had attended
        for row in range(2):
            for head in range(HEADS):
                keys, values = with_itself(held, states, row, head // 3)
                expected = attention(turned(held, states[0][row, head, 0]), keys, values, len(keys))
                torch.testing.assert_close(out[row, head, 0], expected, atol=2e-5, rtol=1e-4)
    assert len(held_tokens(held, 0, 0)[0]) == held.get_seq_length() == 120


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_near_what_came(kind: str) -> None:
    held, stream = layer(kind, KVBits(high=(4, 4), low=(4, 4), ratio=1.0)), Stream()
    parts = [stream(n) for n in (90, 1, 1, 40, 1)]
    for part in parts:
        feed(held, part)
    keys, values = held_tokens(held, 0, 1)
    sent_keys = turned(held, torch.cat([part[1][0, 1] for part in parts]))
    sent_values = torch.cat([part[2][0, 1] for part in parts])
    for found, sent in ((keys, sent_keys), (values, sent_values)):
        assert found.shape == sent.shape
        assert float((found - sent).norm() / sent.norm()) < 0.12
        nearest = torch.cdist(found, sent).argmin(1)
        assert torch.equal(nearest, torch.arange(len(sent)))  # every token in its own place


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_chunk_is_causal_and_sees_everything_before(kind: str) -> None:
    held, stream = layer(kind), Stream()
    feed(held, stream(80))
    keys, values = held_tokens(held, 0, 0)
    query, key, value = stream(9)
    out = feed(held, (query, key, value))
    keys = torch.cat([keys, turned(held, key[0, 0])])
    values = torch.cat([values, value[0, 0]])
    for place in range(9):
        expected = attention(turned(held, query[0, 2, place]), keys, values, 80 + place + 1)
        torch.testing.assert_close(out[0, 2, place], expected, atol=2e-5, rtol=1e-4)


def test_a_prompt_is_attended_in_full_precision() -> None:
    held, (query, key, value) = layer(), Stream()(120)
    out = feed(held, (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(kind: str, side: str) -> None:
    """A padded sequence in a batch is treated as if it were alone, token by token and bit by bit."""
    real = {"left": range(13, 90), "right": range(77), "holes": [*range(30), *range(43, 90)]}[side]
    places = torch.tensor(list(real))
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1] = False
    mask[1, places] = True
    held, alone, stream = layer(kind), layer(kind), Stream(batch=2)
    states = stream(90)
    out = feed(held, states, mask)
    own = feed(alone, tuple(x[1:, :, places] for x in states))  # type: ignore[arg-type]
    torch.testing.assert_close(out[1, :, places], own[0], atol=1e-5, rtol=1e-4)
    assert not out[1, :, ~mask[1]].any()
    for count in (1, 5, 1):
        states = stream(count)
        mask = torch.cat([mask, torch.ones(2, count, dtype=torch.bool)], 1)
        out = feed(held, states, mask)
        own = feed(alone, tuple(x[1:] for x in states))  # type: ignore[arg-type]
        torch.testing.assert_close(out[1:], own, atol=1e-5, rtol=1e-4)
    for head in range(KV_HEADS):
        for found, expected in zip(held_tokens(held, 1, head), held_tokens(alone, 0, head), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_padding_inside_a_later_chunk() -> None:
    held, alone, stream = layer(), layer(), Stream(batch=2)
    states = stream(90)
    feed(held, states)
    feed(alone, tuple(x[1:] for x in states))  # type: ignore[arg-type]
    states = stream(7)
    mask = torch.ones(2, 97, dtype=torch.bool)
    mask[1, 90:93] = False
    out = feed(held, states, mask)
    own = feed(alone, tuple(x[1:, :, 3:] for x in states))  # type: ignore[arg-type]
    torch.testing.assert_close(out[1:, :, 3:], own, atol=1e-4, rtol=1e-3)
    found, expected = held_tokens(held, 1, 0)[0], held_tokens(alone, 0, 0)[0]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_never_written_again(kind: str) -> None:
    held, stream = layer(kind), Stream()
    feed(held, stream(100))

    def checksum(counts: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        for name, arena in part(held).store.arenas.items():
            for head in range(KV_HEADS):
                for room in (arena.keys, arena.values, arena.key_params, arena.value_params):
                    if room is not None:
                        digest.update(room[0, head, : int(counts[name][0, head])].numpy().tobytes())
        return digest.hexdigest()

    counts = {name: arena.counts.clone() for name, arena in part(held).store.arenas.items()}
    before = checksum(counts)
    for _ in range(1000):
        feed(held, stream(1))
    assert checksum(counts) == before
    assert int(part(held).store.packed()[0, 0]) > 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5, 40, 97])
def test_crop_forgets_the_last_tokens_and_nothing_else(kind: str, count: int) -> None:
    held, stream = layer(kind), Stream(batch=2)
    for n in (90, 1, 1, 1, 9):
        feed(held, stream(n))
    before = [held_tokens(held, row, head) for row in range(2) for head in range(KV_HEADS)]
    held.crop(-count)
    assert held.get_seq_length() == 102 - count
    after = [held_tokens(held, row, head) for row in range(2) for head in range(KV_HEADS)]
    for (keys, values), (kept_keys, kept_values) in zip(before, after, strict=True):
        assert torch.equal(keys[: 102 - count], kept_keys)
        assert torch.equal(values[: 102 - count], kept_values)
    states = stream(1)
    out = feed(held, states)
    if len(part(held).window):
        keys, values = with_itself(held, states, 1, 1)
        expected = attention(turned(held, states[0][1, 5, 0]), keys, values, len(keys))
        torch.testing.assert_close(out[1, 5, 0], expected, atol=2e-5, rtol=1e-4)
    for _ in range(60):
        feed(held, stream(1))
    assert len(held_tokens(held, 0, 1)[0]) == held.get_seq_length()


def test_crop_of_a_padded_batch_counts_tokens_and_not_columns() -> None:
    held, stream = layer(), Stream(batch=2)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 80:] = False  # padding behind the tokens
    feed(held, stream(90), mask)
    before = held_tokens(held, 1, 0)[0]
    held.crop(-15)
    assert [len(held_tokens(held, row, 0)[0]) for row in range(2)] == [75, 75]
    assert torch.equal(held_tokens(held, 1, 0)[0], before[:75])


@pytest.mark.parametrize("count", [1, -200])
def test_crop_refuses_what_it_cannot_do(count: int) -> None:
    held = layer()
    feed(held, Stream()(90))
    with pytest.raises(ValueError, match="allowed: 0 to -90"):
        held.crop(count)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_can_be_reordered_repeated_and_selected(kind: str) -> None:
    held, stream = layer(kind), Stream(batch=3)
    feed(held, stream(80))
    before = [held_tokens(held, row, 0) for row in range(3)]
    held.reorder_cache(torch.tensor([2, 0, 2]))
    held.batch_repeat_interleave(2)
    held.batch_select_indices(torch.tensor([0, 3, 4]))
    for row, source in enumerate((2, 0, 2)):
        for found, expected in zip(held_tokens(held, row, 0), before[source], strict=True):
            assert torch.equal(found, expected)
    for _ in range(40):
        feed(held, stream(1))
    assert len(held_tokens(held, 2, 1)[0]) == 120


def test_reset_forgets_everything() -> None:
    held, stream = layer(), Stream()
    feed(held, stream(80))
    held.reset()
    assert held.get_seq_length() == 0
    assert held.nbytes().allocated == 0
    feed(held, stream(5))
    assert held.get_seq_length() == 5


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind: str) -> None:
    held, stream = layer(kind), Stream(batch=2)
    for n in (800, 1, 60, 1):
        feed(held, stream(n))
        size = held.nbytes()
        assert size.allocated == allocated(held, part(held).format.rotation).nbytes
        assert 0 < size.payload < size.stored <= size.allocated
    assert size.allocated < 1.25 * size.stored


@pytest.mark.parametrize("tokens", [1, 2, 46, 48, 49])
def test_short_prompts(tokens: int) -> None:
    held, stream = layer(), Stream()
    out = feed(held, stream(tokens))
    assert out.isfinite().all()
    states = stream(1)
    out = feed(held, states)
    keys, values = with_itself(held, states, 0, 0)
    torch.testing.assert_close(
        out[0, 0, 0], attention(turned(held, states[0][0, 0, 0]), keys, values, tokens + 1), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["zeros", "constant channel", "huge channel"])
def test_odd_states_stay_finite(kind: str, case: str) -> None:
    held, stream = layer(kind), Stream()
    query, key, value = stream(100)
    if case == "zeros":
        key, value = torch.zeros_like(key), torch.zeros_like(value)
    elif case == "constant channel":
        key[..., 3], value[..., 3] = 2.0, -1.0
    else:
        key[..., 3] += 900.0
    feed(held, (query, key, value))
    assert feed(held, stream(1)).isfinite().all()


def test_a_row_of_padding_alone() -> None:
    held, stream = layer(), Stream(batch=2)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1] = False
    out = feed(held, stream(60), mask)
    assert not out[1].any()
    assert out.isfinite().all()
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    states = stream(1)
    out = feed(held, states, mask)
    torch.testing.assert_close(out[1, 0, 0], states[2][1, 0, 0], atol=0.02, rtol=0.02)  # it sees itself alone


def test_states_that_are_not_finite_are_named() -> None:
    held, stream = layer(), Stream()
    query, key, value = stream(90)
    key[0, 0, 5, 3] = math.nan
    with pytest.raises(ValueError, match="aren't finite"):
        feed(held, (query, key, value))


def test_a_head_size_that_cannot_be_packed_is_named() -> None:
    held = layer(rotate=False)
    with pytest.raises(ValueError, match=r"layer 1.*multiple of 8"):
        held.update(torch.zeros(1, 2, 3, 20), torch.zeros(1, 2, 3, 20))


def test_another_attention_function_is_told_what_to_do() -> None:
    handle, _ = layer().update(*Stream()(3)[1:])
    with pytest.raises(AttributeError, match=r"set_attn_implementation\('compress_plan'\)"):
        _ = handle.shape


def test_all_rows_as_probes_are_the_full_definition() -> None:
    query, key, _ = Stream()(50)
    rows = torch.arange(50)
    mass = prompt_mass(query, key, rows, SCALE) / witnesses(rows, 50, official=False)
    scores = (query.view(1, KV_HEADS, 3, 50, WIDTH) @ key[:, :, None].transpose(-1, -2)) * SCALE
    hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(hidden, -math.inf).softmax(-1)
    expected = attended.sum((2, 3)) / torch.arange(50, 0, -1)
    torch.testing.assert_close(mass, expected)


def test_probes_are_a_tenth_capped_ascending_and_the_same_again() -> None:
    packing = Packing(**PLUS)
    rows = probe_rows(200, packing, 3)
    assert len(rows) == 20
    assert torch.equal(rows[-10:], torch.arange(190, 200))
    assert torch.equal(rows, rows.unique())
    assert torch.equal(rows, probe_rows(200, packing, 3))
    assert not torch.equal(rows, probe_rows(200, packing, 4))
    assert len(probe_rows(5000, packing, 3)) == 32
    assert len(probe_rows(5000, dataclasses.replace(packing, probe_cap=0), 3)) == 500
    assert probe_rows(1, packing, 3).tolist() == [0]


def test_the_salient_share_is_exact() -> None:
    score = torch.tensor([[[3.0, 1.0, 2.0, 5.0]]])
    assert salient(score, 0.5).tolist() == [[[True, False, False, True]]]
    assert not salient(score, 0.1).any()


def test_salient_tokens_have_the_higher_bits() -> None:
    """A token that every probe attends to is among the salient ones, and is kept better than the others."""
    held, (query, key, value) = layer(sinks=0), Stream()(100)
    key[:, :, 40] = 8 * query[:, ::3].mean(2)
    query = query * 0.2 + query.mean(2, keepdim=True)
    feed(held, (query, key, value))
    assert part(held).store.labels is not None
    place = Place(slice(0, 1), slice(0, 2))
    assert part(held).store.labels.read(place, 84)[0, :, 40].all()
    assert torch.equal(part(held).store.labels.read(place, 84).sum(2).int(), part(held).store.arenas["high"].counts)


def test_drifting_tokens_begin_another_epoch() -> None:
    held, stream = layer(rotate=False), Stream()
    feed(held, stream(100))
    moved = 30 * torch.randn(WIDTH, generator=stream.generator)
    for _ in range(70):
        query, key, value = stream(1)
        feed(held, (query, key + moved, value))
    assert len(part(held).store.arenas["low"].epochs) > 1
    steady = layer()
    feed(steady, stream(100))
    for _ in range(70):
        feed(steady, stream(1))
    assert len(part(steady).store.arenas["low"].epochs) == 1
