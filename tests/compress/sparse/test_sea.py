"""SEA's estimator and its grid: causality, portions of rows, grouped queries, and the stretch over keys."""

from dataclasses import replace

import pytest
import torch
from sea_cases import SHAPE, drawn, estimator

from compress.sparse.sea import CHUNK, Estimator, Shape, State, orthogonal, prefix_attention
from compress.sparse.sea_pixels import compress, first_key, pixel_of, resize

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


# The grid


@pytest.mark.parametrize("visible", [1, 2, 3, 7, 8, 9, 15, 16, 17, 100, 333])
@pytest.mark.parametrize("width", [4, 8, 256])
def test_every_key_is_in_the_pixel_whose_range_covers_it(visible: int, width: int) -> None:
    edges = first_key(torch.arange(width + 1), torch.tensor(visible), width)
    key = torch.arange(visible)
    pixel = pixel_of(key, torch.tensor(visible), width)
    assert edges[0] == 0
    assert edges[-1] == visible
    assert ((edges[pixel] <= key) & (key < edges[pixel + 1])).all()
    # the gather form of the published code
    assert pixel.tolist() == ((key + 0.5) / visible * width - 1e-4).floor().tolist()
    # rounding, halves up
    assert edges.tolist() == [int(c * visible / width + 0.5) for c in range(width + 1)]


def test_resized_rows_are_probabilities_over_visible_keys() -> None:
    logits = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([1, 5, 8, 20])
    found = resize(logits, visible, 20).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 4))
    assert not found.masked_select(torch.arange(20) >= visible[:, None]).any()
    # at t = W every key has its pixel
    torch.testing.assert_close(found[:, :, 2, :8], logits[:, :, 2].softmax(-1))
    torch.testing.assert_close(found[:, :, 3, 0], found[:, :, 3, 1])


def test_jitter_moves_the_pixels_that_keys_read() -> None:
    logits = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([16])
    assert torch.equal(resize(logits, visible, 16, torch.zeros(1, 16)), resize(logits, visible, 16))
    moved = resize(logits, visible, 16, torch.full((1, 16), 2.0))
    assert torch.equal(moved[..., :14].argsort(), resize(logits, visible, 16)[..., 2:].argsort())


def test_compressed_attention_keeps_its_mass() -> None:
    attention = torch.rand(1, 2, 3, 12, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([2, 7, 12])
    attention = attention.masked_fill(torch.arange(12) >= visible[:, None], 0)
    mass, share = compress(attention, visible, 4)
    torch.testing.assert_close(mass.sum(-1), attention.sum(-1))
    torch.testing.assert_close(share.sum(-1), torch.ones(3))
    torch.testing.assert_close(mass[..., 2, 0], attention[..., 2, :3].sum(-1))


# Linear attention


def test_chunks_of_linear_attention_are_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = CHUNK * 2 + 7
    fq = torch.rand(1, 2, 3, tokens, 5, generator=generator)
    fk = torch.rand(1, 2, tokens, 5, generator=generator)
    x = torch.randn(1, 2, tokens, 4, generator=generator)
    ones = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    weight = (fq @ fk[:, :, None].transpose(-1, -2)).tril()
    expected = weight / weight.sum(-1, keepdim=True) @ x[:, :, None]
    found, sums = prefix_attention(fq, fk, ones, torch.zeros(1, 2, 5, 5))
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(sums, fk.transpose(-1, -2) @ ones, **CLOSE)


def test_random_directions_are_orthogonal_within_a_block() -> None:
    found = orthogonal(20, 8, torch.Generator().manual_seed(0))
    for block in found.split(8):
        unit = torch.nn.functional.normalize(block, dim=1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    assert found.norm(dim=1).std() > 0.1


# The estimator


def test_rows_sum_to_one_and_heads_differ() -> None:
    found = estimator().estimate(*drawn(50, batch=2))
    assert found.shape == (2, 4, 50, 16)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 50))
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("place", [1, 17, 49])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_later_token_changes_no_earlier_estimate(place: int, part: int) -> None:
    tokens, model = drawn(50), estimator()
    before = model.estimate(*tokens)
    tokens[part][:, :, place] += 1
    after = model.estimate(*tokens)
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert (before[:, :, place] - after[:, :, place]).abs().max() > 1e-5


def test_every_parameter_changes_the_estimate() -> None:
    tokens, model = drawn(50), estimator(replace(SHAPE, mixed=True)).requires_grad_()
    rows = model(*tokens)
    (rows.logits.softmax(-1)[..., :3].square().sum() + rows.scales.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        used = parameter.grad[:50] if name == "positions" else parameter.grad
        assert used.abs().max() > 0, name


@pytest.mark.parametrize("sizes", [[1] * 40, [13, 1, 1, 25], [40], [3, CHUNK + 9, 1]])
@pytest.mark.parametrize("places", [320, 20])
def test_portions_of_rows_are_the_whole(sizes: list[int], places: int) -> None:
    shape = replace(SHAPE, mixed=True, places=places)
    model, tokens = estimator(shape), drawn(sum(sizes), batch=2)
    whole = model(*tokens)
    state, parts = State.empty(shape, 2), []
    for q, k, v in zip(*(x.split(sizes, 2) for x in tokens), strict=True):
        parts.append(model(q, k, v, state))
        state = parts[-1].state
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 2), whole.logits, **CLOSE)
    torch.testing.assert_close(torch.cat([part.scales for part in parts], 2), whole.scales, **CLOSE)
    torch.testing.assert_close(torch.cat([part.mean for part in parts], 2), whole.mean, **CLOSE)
    for ours, theirs in zip(state.parts(), whole.state.parts(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_sequences_of_a_batch_may_be_of_different_lengths() -> None:
    model, (q, k, v) = estimator(), drawn(30, batch=2)
    lengths = [29, 11]
    rows = [model(*(x[b : b + 1, :, :n] for x in (q, k, v))) for b, n in enumerate(lengths)]
    new = [torch.stack([x[b, :, n] for b, n in enumerate(lengths)])[:, :, None] for x in (q, k, v)]
    found = model(*new, State.together([row.state for row in rows]))
    for b, n in enumerate(lengths):
        whole = model(*(x[b : b + 1, :, : n + 1] for x in (q, k, v)))
        torch.testing.assert_close(found.logits[b], whole.logits[0, :, -1:], **CLOSE)
    swapped = model(
        *(x.flip(0) for x in new), State.together([rows[0].state, rows[1].state]).select(torch.tensor([1, 0]))
    )
    torch.testing.assert_close(swapped.logits.flip(0), found.logits, **CLOSE)


def test_grouped_queries_are_repeated_keys_and_values() -> None:
    """Query heads of a group see the same keys and values, as if these were repeated for each."""
    tokens, grouped = drawn(40), estimator()
    each = Estimator(replace(SHAPE, kv_heads=4)).requires_grad_(False)
    each.load_state_dict(grouped.state_dict())
    q, k, v = tokens
    repeated = each(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(repeated.logits, grouped(q, k, v).logits, **CLOSE)


def test_the_state_does_not_grow_and_holds_no_rows() -> None:
    model = estimator()
    sizes = []
    for tokens in (20, 300):
        state = model(*drawn(tokens)).state
        sizes.append(sum(part.untyped_storage().nbytes() for part in state.parts()))
    assert sizes[0] == sizes[1]


def test_positions_are_stretched_over_longer_sequences() -> None:
    model = Estimator(replace(SHAPE, length=9, places=5))
    found = model._positions(torch.arange(9)[None])[0]
    torch.testing.assert_close(found[::2], model.positions.data)
    torch.testing.assert_close(found[1], (model.positions[0] + model.positions[1]).data / 2)


def test_mixing_is_the_papers_sum() -> None:
    shape = replace(SHAPE, mixed=True)
    (q, k, v), model = drawn(20), estimator(shape)
    rows, out = model(q, k, v), torch.randn(1, 4, 20, 8, generator=torch.Generator().manual_seed(3))
    mean = (v.cumsum(2) / torch.arange(1, 21)[:, None]).repeat_interleave(2, 1)
    s0, s1 = rows.scales[..., :1], rows.scales[..., 1:]
    torch.testing.assert_close(rows.mix(out), s1 * s0 * out + (1 - s1) * mean, **CLOSE)
    fresh = Estimator(shape)(q, k, v)
    assert (fresh.mix(out) - out).abs().max() < 0.02
    assert estimator()(q, k, v).mix(out) is out


def test_the_same_seed_gives_the_same_estimator() -> None:
    one, two, other = (Estimator(SHAPE, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["directions"], other["directions"])


def test_wrong_shapes_and_too_many_tokens_are_told() -> None:
    model, (q, k, v) = estimator(), drawn(10)
    with pytest.raises(ValueError, match="4 query and 2 KV heads of 8"):
        model(q[:, :3], k, v)
    with pytest.raises(ValueError, match="don't fit"):
        model(q, k[:, :, :9], v)
    with pytest.raises(ValueError, match="at most 320 tokens, got 321"):
        model(*drawn(321))
    with pytest.raises(ValueError, match="of 2 sequences, the queries of 1"):
        model(q, k, v, State.empty(SHAPE, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        replace(SHAPE, width=10)
    with pytest.raises(ValueError, match="groups"):
        Shape(heads=5, kv_heads=2, head_dim=8, length=4)
