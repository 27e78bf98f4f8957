"""Heads with windows against their definition: which tokens were dropped is noted, and every row attends by a mask."""

import copy
import random

import pytest
import torch
from compress.evalsuite.efficiency import allocated
from torch import Tensor, nn

from compress.kv.attention import plan_attention
from compress.kv.layer import Cluster, Handle, PlanLayer
from compress.kv.plain import PlainPart, Reach
from compress.plan import Stride, Window

WIDTH = 16
SCALE = WIDTH**-0.5
FULL = Reach(0, Window())
REACHES: dict[str, Reach] = {
    "full": FULL,
    "sinks and window": Reach(16, Window(a=64, b=0.0)),
    "window alone": Reach(0, Window(a=128, b=0.0)),
    "elastic": Reach(8, Window(a=-40, b=0.5, min=10)),
    "elastic for a length": Reach(8, Window(a=0, b=0.3), length=400),
    "strided": Reach(4, Window(a=64, b=0.0), Stride(every=3, phase=1)),
    "elastic and strided": Reach(20, Window(a=0, b=0.4, min=5), Stride(every=2)),
}


class Definition:
    """All keys and values of a head of one sequence, and which of them were dropped."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.keys, self.values = torch.zeros(0, WIDTH), torch.zeros(0, WIDTH)
        self.there = torch.zeros(0, dtype=torch.bool)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Rows [group, new, head_dim] at a length of the longest sequence."""
        before = len(self.keys)
        self.keys, self.values = torch.cat([self.keys, key]), torch.cat([self.values, value])
        self.there = torch.cat([self.there, torch.ones(len(key), dtype=torch.bool)])
        places = torch.arange(len(self.keys))
        rows = places[before:, None]
        span = self.reach.span(length)
        kept = places < self.reach.sink
        if self.reach.stride is not None:
            kept = kept | ((places // 64 - self.reach.stride.phase) % self.reach.stride.every == 0)
        near = torch.ones(len(rows), len(places), dtype=torch.bool) if span is None else places > rows - span
        seen = self.there & (kept | near) & (places <= rows)
        scores = (query.double() @ self.keys.double().T * SCALE).masked_fill(~seen, -torch.inf)
        if span is not None:
            self.there &= kept | (places >= len(places) - span)
        return (scores.softmax(-1) @ self.values.double()).float()


def attended(layer: PlanLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """As a model attends: the output, and whether it was the layer that gave it."""
    module = nn.Identity()
    module.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
    held = layer.update(key, value)
    out, _ = plan_attention(module, query, *held, mask, scaling=SCALE)
    return out.transpose(1, 2), isinstance(held[0], Handle)


class Sides:
    """A layer with clusters, and the definition of each of its heads, given the same tokens."""

    def __init__(self, reaches: list[Reach], group: int, batch: int, seed: int = 0) -> None:
        self.group, self.batch, self.heads = group, batch, len(reaches)
        unlike = list(dict.fromkeys(reaches))
        clusters = [
            Cluster(tuple(n for n, own in enumerate(reaches) if own == reach), PlainPart(reach)) for reach in unlike
        ]
        self.layer = PlanLayer(0, clusters)
        self.defined = [[Definition(reach) for reach in reaches] for _ in range(batch)]
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = torch.zeros(batch, 0, dtype=torch.bool)

    def send(self, new: Tensor) -> None:
        """New columns, [batch, count] bool."""
        count = new.shape[1]
        query = torch.randn(self.batch, self.heads * self.group, count, WIDTH, generator=self.generator)
        key, value = torch.randn(2, self.batch, self.heads, count, WIDTH, generator=self.generator)
        self.mask = torch.cat([self.mask, new], 1)
        out, handled = attended(self.layer, query, key, value, None if bool(self.mask.all()) else self.mask)
        length = int(self.mask.sum(1).max())
        for row, head in ((row, head) for row in range(self.batch) for head in range(self.heads)):
            own, places = slice(head * self.group, (head + 1) * self.group), new[row]
            expected = self.defined[row][head].attend(
                query[row, own, places], key[row, head, places], value[row, head, places], length
            )
            torch.testing.assert_close(out[row, own, places], expected, atol=1e-5, rtol=1e-4)
            assert not handled or not out[row, own, ~places].any()


def columns(batch: int, count: int, padding: int = 0) -> Tensor:
    new = torch.ones(batch, count, dtype=torch.bool)
    new[0, :padding] = False
    return new


@pytest.mark.parametrize("name", REACHES)
@pytest.mark.parametrize("padding", [0, 37])
def test_every_row_sees_what_the_definition_says(name: str, padding: int) -> None:
    sides = Sides([REACHES[name]], group=3, batch=2)
    for count, left in ((150, padding), (1, 0), (90, 0), (3, 2 if padding else 0), (70, 0)):
        sides.send(columns(2, count, left))
    for _ in range(140):
        sides.send(columns(2, 1))


@pytest.mark.parametrize("seed", range(6))
def test_heads_of_one_layer_may_differ(seed: int) -> None:
    draw = random.Random(seed)
    reaches = [REACHES[draw.choice(list(REACHES))] for _ in range(draw.choice([1, 2, 4]))]
    sides = Sides(reaches, group=draw.choice([1, 3]), batch=draw.choice([1, 3]), seed=seed)
    for _ in range(25):
        count = draw.choice([1, 1, 1, 5, 64, 130])
        sides.send(columns(sides.batch, count, draw.choice([0, 0, count // 2])))


def test_a_single_sequence_with_padding_alone_before_it() -> None:
    sides = Sides([REACHES["sinks and window"], FULL], group=1, batch=1)
    sides.send(columns(1, 10, 10))
    sides.send(columns(1, 20, 18))
    sides.send(columns(1, 100))


def test_a_window_keeps_what_it_sees_and_no_more() -> None:
    layer = PlanLayer(0, [Cluster(None, PlainPart(Reach(16, Window(a=64, b=0.0))))])
    states = torch.randn(1, 3, 1000, WIDTH)
    attended(layer, states, states, states, None)
    for _ in range(100):
        attended(layer, *(states[:, :, :1],) * 3, None)
    size = layer.nbytes()
    assert size.payload == size.stored == 2 * 3 * 80 * WIDTH * 4
    assert size.allocated == allocated(layer).nbytes
    assert size.allocated < 1.02 * size.stored


def test_what_was_dropped_cannot_be_cropped_into() -> None:
    sides = Sides([FULL, REACHES["sinks and window"]], group=1, batch=1)
    sides.send(columns(1, 75))
    assert sides.layer.is_croppable
    sides.layer.crop(-5)
    for own in sides.defined[0]:
        own.keys, own.values, own.there = own.keys[:70], own.values[:70], own.there[:70]
    sides.mask = sides.mask[:, :70]
    sides.send(columns(1, 30))
    assert not sides.layer.is_croppable
    with pytest.raises(ValueError, match="dropped the tokens"):
        sides.layer.crop(-1)
    assert sides.layer.get_seq_length() == 100


@pytest.mark.parametrize("name", ["full", "elastic", "strided"])
def test_sequences_can_be_reordered_repeated_selected_and_copied(name: str) -> None:
    sides = Sides([REACHES[name], FULL], group=2, batch=3)
    sides.send(columns(3, 200, 20))
    sides.send(columns(3, 1))
    sides.layer = copy.deepcopy(sides.layer)
    sides.layer.reorder_cache(torch.tensor([2, 0, 2]))
    sides.layer.batch_repeat_interleave(2)
    sides.layer.batch_select_indices([0, 2, 4])
    sides.defined = [copy.deepcopy(sides.defined[row]) for row in (2, 0, 2)]
    sides.mask = sides.mask[[2, 0, 2]]
    for count in (1, 1, 30, 1):
        sides.send(columns(3, count))
    sides.layer.reset()
    assert sides.layer.get_seq_length() == sides.layer.nbytes().allocated == 0


def test_caller_s_tensors_are_not_written_to() -> None:
    layer = PlanLayer(0, [Cluster(None, PlainPart(Reach(0, Window(a=64, b=0.0))))])
    states = torch.randn(1, 1, 70, WIDTH)
    sent = states.clone()
    attended(layer, states, states, states, None)
    for _ in range(3):
        attended(layer, *(sent[:, :, :1],) * 3, None)
    assert torch.equal(states, sent)


def test_the_model_s_own_attention_is_used_until_a_token_is_dropped() -> None:
    layer = PlanLayer(0, [Cluster((0,), PlainPart(FULL)), Cluster((1,), PlainPart(Reach(6, Window(a=64, b=0.0))))])
    states = torch.randn(1, 2, 69, WIDTH)
    assert not attended(layer, states, states, states, None)[1]
    assert not attended(layer, *(states[:, :, :1],) * 3, None)[1]
    assert layer.is_croppable
    assert layer.nbytes().stored == 2 * 2 * 70 * WIDTH * 4
    assert attended(layer, *(states[:, :, :1],) * 3, None)[1]
    assert layer.nbytes().stored == 2 * (71 + 70) * WIDTH * 4
    assert not layer.is_croppable


@pytest.mark.parametrize("name", REACHES)
def test_what_is_certainly_seen_is_seen(name: str) -> None:
    """And a window that doesn't grow drops the token behind it."""
    reach = REACHES[name]
    lengths = [length for length in range(1, 600) if length <= reach.whole]
    assert not any(reach.drops(length) for length in lengths)
    if reach.window.b == 0:
        assert reach.drops(len(lengths) + 1)
