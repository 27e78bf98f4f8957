"""The attention operations against transformers' attention and against each other."""

import importlib
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import bounds_of_triton
import pytest
import torch
from compress.kernels import triton_support
from compress.kernels.attention_mass import attention_mass
from compress.kernels.flash_decode import flash_decode
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.flash_prefill import path as prefill_path
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward


def tensors(batch: int, heads: int, kv_heads: int, rows: int, length: int, width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, rows), (kv_heads, length), (kv_heads, length))
    return tuple(torch.randn(batch, h, n, width, generator=generator) for h, n in shapes)


def eager(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' output ``[B, H, R, D]`` and probabilities ``[B, H, R, T]``."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    out, probabilities = eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)
    return out.transpose(1, 2), probabilities


def causal(rows: int, length: int, starts: Tensor, window: int | None = None) -> Tensor:
    """Keys that must not be seen ``[B, 1, R, T]``, for sequences padded to the left."""
    place = torch.arange(length - rows, length)[:, None]
    slot = torch.arange(length)
    hidden = (slot > place) | (slot < starts[:, None, None])
    if window is not None:
        hidden |= slot <= place - window
    return hidden[:, None]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_prefill_and_decode_are_what_transformers_computes(
    heads: int, kv_heads: int, window: int | None, rows: int
) -> None:
    length, starts = 300, torch.tensor([0, 37])
    q, k, v = tensors(2, heads, kv_heads, rows, length)
    expected, _ = eager(q, k, v, causal(rows, length, starts, window))
    bounds = torch.stack([starts, torch.full_like(starts, length)], 1)
    reach = None if window is None else torch.tensor([[0, window]]).expand(kv_heads, 2)
    seen = (torch.arange(length - rows, length) >= starts[:, None])[:, None, :, None]
    for op in (flash_prefill, flash_decode):
        out, lse = op(q, k, v, None, bounds, reach)
        torch.testing.assert_close(out, expected * seen, rtol=1e-5, atol=1e-5)
        assert torch.equal(lse.isfinite(), seen[..., 0].expand_as(lse))
    plain, _ = flash_prefill(q, k, v)
    torch.testing.assert_close(plain, eager(q, k, v, causal(rows, length, 0 * starts))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_mass_is_the_column_sum_of_transformers_probabilities(window: int | None) -> None:
    q, k, v = tensors(2, 6, 2, 200, 200)
    _, probabilities = eager(q, k, v, causal(200, 200, torch.zeros(2, dtype=torch.int64), window))
    mass = attention_mass(q, k, None, 0.25, window)
    torch.testing.assert_close(mass, probabilities.sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention_mass(q, k, None, 0.25, window, True), mass.sum(1), rtol=1e-5, atol=1e-5)
    rows = torch.tensor([199, 0, 55, 55, 130])
    probes = attention_mass(q[:, :, rows], k, rows, 0.25, window)
    torch.testing.assert_close(probes, probabilities[:, :, rows].sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_mass_adds_up_to_the_rows_that_see_a_key(window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 180, (150,), generator=generator)
    q, k, _ = tensors(1, 3, 1, 150, 170)
    mass = attention_mass(q, k, rows, 1.0, window)
    seeing = (rows >= 0) & (rows - (10**6 if window is None else window) + 1 < 170)
    assert mass.sum(-1).tolist()[0] == pytest.approx([float(seeing.sum())] * 3, abs=1e-3)
    assert not mass[..., int(rows.max()) + 1 :].any()


def test_parts_of_the_keys_merge_by_their_log_sum_exp() -> None:
    q, k, v = tensors(2, 4, 2, 1, 100)
    out, lse = flash_decode(q, k, v)
    parts = [flash_decode(q, k, v, None, torch.tensor([[low, high]] * 2)) for low, high in ((0, 7), (7, 60), (60, 100))]
    sums = torch.stack([part for _, part in parts])
    torch.testing.assert_close(sums.logsumexp(0), lse)
    merged = sum((part_lse - lse).exp()[..., None] * part for part, part_lse in parts)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-6)


def test_a_part_without_keys_changes_no_merge() -> None:
    q, k, v = tensors(1, 2, 1, 1, 10)
    out, lse = flash_decode(q, k, v, None, torch.tensor([[4, 4]]))
    assert not out.any()
    assert (lse == -math.inf).all()


def test_a_reach_over_everything_is_dense_and_counts_no_key_twice() -> None:
    q, k, v = tensors(1, 2, 2, 60, 60)
    dense = flash_prefill(q, k, v)
    for reach in ([60, 1], [0, 60], [40, 40], [1000, 1000]):
        found = flash_prefill(q, k, v, None, None, torch.tensor([reach, reach]))
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    ones = flash_prefill(q, k, torch.ones_like(v), None, None, torch.tensor([[5, 20], [30, 3]]))[0]
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_wrong_shapes_are_told() -> None:
    q, k, v = tensors(1, 4, 2, 5, 9)
    with pytest.raises(ValueError, match="4 query heads aren't a multiple of 3 KV heads"):
        flash_prefill(q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"bounds must be integers \[1, 2\]"):
        flash_decode(q, k, v, None, torch.tensor([9]))
    with pytest.raises(ValueError, match="don't fit keys and values"):
        flash_prefill(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="one dtype"):
        flash_decode(q, k.half(), v)
    with pytest.raises(ValueError, match="9 query rows don't fit 5 keys"):
        flash_prefill(*(x.repeat(1, 2, 1, 1) for x in (k, q[:, :2], q[:, :2])))
    with pytest.raises(ValueError, match="window=0"):
        attention_mass(q, k, None, 1.0, 0)
    with pytest.raises(ValueError, match=r"rows must be integers \[5\]"):
        attention_mass(q, k, torch.tensor([1.0] * 5), 1.0)


@pytest.mark.parametrize("op", [flash_prefill, flash_decode])
def test_bounds_and_reach_beyond_the_keys_are_told(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    q, k, v = tensors(2, 4, 2, 5, 9)
    for bad in ([0, 10], [-1, 9], [6, 5], [10, 10]):
        with pytest.raises(ValueError, match=f"bounds of sequence 1 are {bad[0]}:{bad[1]}, .* within 9 slots"):
            op(q, k, v, None, torch.tensor([[0, 9], bad]))
    for bad in ([-1, 3], [0, 0], [2, -4]):
        with pytest.raises(ValueError, match=f"KV head 1 is a sink of {bad[0]} and a window of {bad[1]}"):
            op(q, k, v, None, None, torch.tensor([[0, 9], bad]))
    with pytest.raises(ValueError, match="bounds must be on cpu like the queries, got meta"):
        op(q, k, v, None, torch.empty(2, 2, dtype=torch.int32, device="meta"))


@pytest.mark.interpreter
@pytest.mark.skipif(not triton_support.AVAILABLE, reason="Triton has no wheel for this platform")
def test_bounds_beyond_the_keys_are_cut_on_a_gpu(interpreter: ProcessPoolExecutor) -> None:
    """Looking at them first would mean waiting for the GPU, so the kernels see to it that nothing else is read."""
    found = interpreter.submit(bounds_of_triton.cuts).result()
    assert len(found) == 6
    assert all(found.values()), found


@pytest.mark.skipif(not triton_support.AVAILABLE, reason="Triton has no wheel for this platform")
def test_decode_on_a_gpu_names_the_operation_for_many_rows() -> None:
    from compress.kernels.flash_decode import triton

    q, k, v = (x.to("meta").half() for x in tensors(1, 8, 1, 9, 16))
    with pytest.raises(ValueError, match="at most 64 query rows a KV head, got 72; use flash_prefill"):
        triton.launches(q, k, v, None, None, None)


def test_a_cpu_takes_the_reference_path() -> None:
    assert prefill_path(torch.zeros(1)) == "reference"


@pytest.mark.parametrize(
    "op", ["flash_prefill", "flash_decode", "ragged_decode", "segment_attention", "block_attention"]
)
def test_wide_heads_take_the_reference_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "check", lambda device: None)
    path = importlib.import_module(f"compress.kernels.{op}").path
    for width, expected in ((256, "triton"), (257, "reference")):
        q = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda"), shape=(1, 1, 1, width))
        assert path(q) == expected
