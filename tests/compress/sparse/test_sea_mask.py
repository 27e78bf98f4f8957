"""Lists from compressed attention: against a plain grouped top-k, in portions, padded, and token by token."""

from dataclasses import replace

import pytest
import torch
from compress.kernels.block_attention import BlockList, block_attention
from compress.kernels.flash_prefill.reference import attend
from sea_cases import SHAPE, drawn, estimator
from torch import Tensor

from compress.sparse import sea_mask
from compress.sparse.sea import Estimator
from compress.sparse.sea_mask import Budget, block_lists, chunk, pool, prompt
from compress.sparse.sea_pixels import first_key

BUDGET = Budget(keys=12, block_q=8, block_k=4, sink=3, window=10, apart=False)


def lists(blocks: BlockList) -> list[list[list[list[int]]]]:
    """Starts by sequence, head and block of rows."""
    return [
        [[starts[:count].tolist() for starts, count in zip(*head, strict=True)] for head in zip(*item, strict=True)]
        for item in zip(blocks.starts, blocks.counts, strict=True)
    ]


def plain(scores: Tensor, seen: int, limit: int, budget: Budget) -> list[list[int]]:
    """Lists of one block of rows from ``[N, W]``: pixels by falling score, keys of the winners, blocks of these."""
    heads, width = scores.shape
    edges = [int(first_key(torch.tensor(c), torch.tensor(seen), width)) for c in range(width + 1)]
    count = min(heads * width, max(1, round(heads * budget.keys * budget.oversample * width / seen)))
    keys = {(c): [j for j in range(edges[c], edges[c + 1]) if budget.sink <= j < limit] for c in range(width)}
    ranked = sorted(((n, c) for n in range(heads) for c in range(width) if keys[c]), key=lambda at: -float(scores[at]))
    found: list[set[int]] = [set() for _ in range(heads)]
    for n, c in ranked[:count]:
        found[n] |= {(j - budget.sink) // budget.block_k * budget.block_k + budget.sink for j in keys[c]}
    return [sorted(starts) for starts in found]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [40, 77, 131])
def test_lists_are_those_of_a_plain_grouped_top_k(tokens: int, shared: bool) -> None:
    budget = replace(BUDGET, shared=shared)
    estimate = estimator().estimate(*drawn(tokens))
    found = lists(block_lists(estimate, torch.tensor([tokens]), budget, torch.tensor([0]), 2))[0]
    pooled = pool(estimate, torch.tensor([tokens]), budget, 2)[0]
    assert len(found) == (2 if shared else 4)
    for block in range(-(-tokens // 8)):
        seen = min((block + 1) * 8, tokens)
        assert [head[block] for head in found] == plain(pooled[:, block], seen, seen - 10, budget)


def test_blocks_that_windows_reach_into_are_left_out() -> None:
    tokens, budget = 90, replace(BUDGET, apart=True, keys=1000)
    estimate = estimator().estimate(*drawn(tokens))
    for head in lists(block_lists(estimate, torch.tensor([tokens]), budget, torch.tensor([0]), 2))[0]:
        for block, starts in enumerate(head):
            near = block * 8 - budget.window + 1  # of the block's first row
            assert starts == [start for start in range(3, tokens, 4) if start + 4 <= near]


def test_rows_of_a_block_are_brought_onto_the_grid_of_its_last() -> None:
    """A peak at the same keys in every row of a block, in other pixels of each, is one peak."""
    rows, width, key = 16, 8, 20
    estimate = torch.zeros(1, 1, rows, width)
    for row in range(rows):
        seen = 48 - rows + row + 1
        estimate[0, 0, row, int((key + 0.5) / seen * width - 1e-4)] = 1
    found = pool(estimate, torch.tensor([48]), Budget(block_q=16), 1)[0, 0, 0]
    edges = first_key(torch.arange(width + 1), torch.tensor(48), width)
    near = (edges[1:] > key - 6) & (edges[:-1] <= key + 6)
    assert found[3] == 1
    assert not found[~near].any()


def test_heads_compete_for_the_budget() -> None:
    estimate = torch.full((1, 2, 1, 16), 1 / 16)
    estimate[0, 0] = torch.tensor([0.01] * 4 + [0.2] * 4 + [0.02] * 8)
    budget = Budget(keys=2 * 16, block_q=1, block_k=8, sink=0, window=1, shared=False)
    found = block_lists(estimate, torch.tensor([256]), budget, torch.tensor([0]), 2)
    # four pixels of 16 keys win for both heads together, and they are all of head 0
    assert lists(found)[0][0][0] == list(range(64, 128, 8))
    assert lists(found)[0][1][0] == []
    assert found.counts.tolist() == [[[8], [0]]]


@pytest.mark.parametrize("window", [1, 10, 200])
def test_a_budget_for_all_keys_is_dense_attention(window: int) -> None:
    q, k, v = drawn(100, batch=2)
    budget = replace(BUDGET, keys=1000, window=window)
    blocks = prompt(estimator(), q, k, v, budget).blocks
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    assert torch.equal(blocks.visible(100, 100), causal.expand(2, 2, 100, 100))
    expected, _ = attend(q, k, v, None, causal[None, None])
    torch.testing.assert_close(block_attention(q, k, v, blocks)[0], expected, atol=1e-5, rtol=1e-5)


def test_lists_stay_near_the_budget() -> None:
    q, k, v = drawn(320)
    blocks = prompt(estimator(), q, k, v, Budget(keys=32, block_q=8, block_k=4, sink=4, window=16)).blocks
    listed = blocks.counts[0, :, 20:].float().mean() * 4
    assert 16 <= listed <= 96  # rounding a pixel of 20 keys out to blocks of 4 adds at most 6


@pytest.mark.parametrize("apart", [True, False])
def test_portions_give_the_same_lists(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, model, budget = drawn(200, batch=2), estimator(replace(SHAPE, mixed=True)), replace(BUDGET, apart=apart)
    whole = prompt(model, *tokens, budget)
    monkeypatch.setattr(sea_mask, "PORTION", 64 * 16)
    parts = prompt(model, *tokens, budget)
    assert lists(parts.blocks) == lists(whole.blocks)
    torch.testing.assert_close(parts.scales, whole.scales)
    torch.testing.assert_close(parts.mean, whole.mean)


def test_padded_sequences_get_the_lists_they_have_alone() -> None:
    model, (q, k, v) = estimator(replace(SHAPE, mixed=True)), drawn(80, batch=3)
    bounds = torch.tensor([[0, 80], [16, 80], [5, 70]])
    found = prompt(model, q, k, v, BUDGET, bounds)
    ours = lists(found.blocks)
    visible = found.blocks.visible(80, 80, bounds)
    for b, (first, end) in enumerate(bounds.tolist()):
        count = end - first
        alone = prompt(model, q[b, None, :, 80 - count :], k[b, None, :, first:end], v[b, None, :, first:end], BUDGET)
        if b < 2:  # whole blocks of padding: the lists themselves, moved
            theirs = [[[s + first for s in starts] for starts in head] for head in lists(alone.blocks)[0]]
            assert [head[-len(theirs[0]) :] for head in ours[b]] == theirs
            assert not any(starts for head in ours[b] for starts in head[: -len(theirs[0])])
        assert not visible[b, :, : 80 - count].any()
        torch.testing.assert_close(found.scales[b, :, 80 - count :], alone.scales[0])
        for mine, other in zip(found.state.parts(), alone.state.parts(), strict=True):
            torch.testing.assert_close(mine[b], other[0])


@pytest.mark.parametrize("new", [1, 3])
def test_lists_of_new_tokens_are_those_of_the_whole(new: int) -> None:
    model, (q, k, v) = estimator(), drawn(120, batch=2)
    budget, start = replace(BUDGET, block_q=1), 90
    whole = lists(prompt(model, q, k, v, budget).blocks)
    state = prompt(model, *(x[:, :, :start] for x in (q, k, v)), budget).state
    for begin in range(start, 120, new):
        part = slice(begin, begin + new)
        found = chunk(model, q[:, :, part], k[:, :, part], v[:, :, part], budget, state)
        state = found.state
        for b in range(2):
            assert lists(found.blocks)[b] == [head[part] for head in whole[b]]


def test_ties_are_settled_the_same_way_every_time() -> None:
    """A fresh estimator's pixels are equal four at a time."""
    model, (q, k, v) = Estimator(SHAPE).requires_grad_(False), drawn(120)
    budget = replace(BUDGET, block_q=1, keys=7)
    whole = lists(prompt(model, q, k, v, budget).blocks)[0]
    state = prompt(model, *(x[:, :, :119] for x in (q, k, v)), budget).state
    found = chunk(model, *(x[:, :, 119:] for x in (q, k, v)), budget, state)
    assert lists(found.blocks)[0] == [head[119:] for head in whole]


def test_wrong_budgets_and_prompts_are_told() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        replace(BUDGET, window=0)
    with pytest.raises(ValueError, match="oversample must be above 0"):
        replace(BUDGET, oversample=0.0)
    q, k, v = drawn(20)
    with pytest.raises(ValueError, match="5 rows, 20 tokens"):
        prompt(estimator(), q[:, :, -5:], k, v, BUDGET)
