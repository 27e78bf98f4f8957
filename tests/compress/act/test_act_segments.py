"""Re-weighted attention, against the matrix of probabilities as the paper has it."""

import math

import pytest
import torch
from torch import Tensor

from compress.act.segments import calibrated, calibrated_row, split
from compress.act.sinks import received, sight, sinks
from compress.plan import Calibration

BETA, SCALING = 0.4, 0.3


def states(seed: int = 0, rows: int = 40, tokens: int = 40, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, 6, rows, 16, generator=generator)
    key, value = torch.randn(2, batch, 2, tokens, 16, generator=generator)
    key[:, :, 5] *= 3  # some rows give it nearly all of their attention
    return query, key, value


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    rows, tokens = query.shape[2], key.shape[2]
    scores = query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3) * SCALING
    hidden = torch.ones(rows, tokens, dtype=torch.bool).triu(tokens - rows + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def matrix_act(attention: Tensor, found: Tensor, beta: float) -> Tensor:
    """The published steps: scale the sinks' columns, hand what was taken to all others in proportion."""
    chosen = found[:, :, None].expand_as(attention)
    taken = (1 - beta) * attention.masked_fill(~chosen, 0).sum(-1, keepdim=True)
    others = attention.masked_fill(chosen, 0)
    return torch.where(chosen, beta * attention, others + taken * others / others.sum(-1, keepdim=True))


def marked(query: Tensor, key: Tensor) -> Tensor:
    found = torch.zeros(*query.shape[:2], key.shape[2], dtype=torch.bool)
    found[:, :, [5, 11, 30]] = True
    found[:, 1, 5] = False  # query heads of one group have sinks of their own
    found[-1, 4] = False
    return found


@pytest.mark.parametrize("rows", [40, 13, 1])
def test_the_merge_of_two_segments_is_act_on_the_matrix(rows: int) -> None:
    query, key, value = states(rows=rows)
    found = marked(query, key)
    wanted = matrix_act(probabilities(query, key), found, BETA) @ value.double().repeat_interleave(3, 1)
    out = calibrated(query, key, value, found, (BETA, SCALING))
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)
    if rows == 1:
        row = calibrated_row(query, key, value, found.to(torch.int8), (BETA, SCALING))
        torch.testing.assert_close(row.double(), wanted, atol=1e-5, rtol=0)


def test_rows_before_the_first_sink_are_untouched() -> None:
    query, key, value = states()
    dense = probabilities(query, key) @ value.double().repeat_interleave(3, 1)
    out = calibrated(query, key, value, marked(query, key), (BETA, SCALING)).double()
    torch.testing.assert_close(out[:, :, :5], dense[:, :, :5], atol=1e-6, rtol=0)
    assert float((out - dense)[:, 0, 5:].abs().max()) > 0.1


def test_a_row_that_gives_a_sink_everything_keeps_finite_numbers() -> None:
    query, key, value = states(batch=1)
    key[:, :, 5] = 10 * query[:, 0:1, 20]  # share of 1 to rounding
    found = marked(query, key)
    wanted = matrix_act(probabilities(query, key), found, BETA)[0, 0, 20] @ value[0, 0].double()
    out = calibrated(query, key, value, found, (BETA, SCALING))
    assert bool(out.isfinite().all())
    assert float(split(query, key, value, found, SCALING).share[0, 0, 20]) > 0.999999
    torch.testing.assert_close(out[0, 0, 20].double(), wanted, atol=1e-5, rtol=0)
    seen = key[:, :, :21], value[:, :, :21], found[..., :21].to(torch.int8)
    row = calibrated_row(query[:, :, 20:21], *seen, (BETA, SCALING))
    torch.testing.assert_close(row[0, 0, 0].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_further_channels_fit_sixteen_bits(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in states())
    found = marked(query, key)
    wanted = matrix_act(probabilities(query, key), found, BETA) @ value.double().repeat_interleave(3, 1)
    out = calibrated(query, key, value, found, (BETA, SCALING))
    torch.testing.assert_close(out.double(), wanted, atol=3e-2, rtol=0)


def test_the_slope_is_the_derivative_by_beta() -> None:
    query, key, value = (x.double() for x in states())
    parts = split(query, key, value, marked(query, key), SCALING)
    difference = (parts.merged(1.0) - parts.merged(0.9)).double() / 0.1
    torch.testing.assert_close(parts.slope().double(), difference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("relative", [True, False])
def test_sinks_are_columns_above_the_threshold(relative: bool) -> None:
    query, key, _ = states()
    how = Calibration(BETA, 5.0 if relative else 0.1, relative)
    attention = probabilities(query, key)
    means = attention.sum(2) / torch.arange(40, 0, -1)
    wanted = means > (5.0 / 40 if relative else 0.1)
    assert bool(wanted[..., 0].any())
    wanted[..., 0] = False
    found = sinks(received(query, key, SCALING), sight(40, 40, query.device), how)
    assert bool(wanted.any())
    torch.testing.assert_close(found, wanted)


def test_the_last_rows_see_every_earlier_token() -> None:
    torch.testing.assert_close(sight(3, 6, torch.device("cpu")), torch.tensor([3.0, 3, 3, 3, 2, 1]))
