"""One pass over a tiny model: the cache's bytes against sums made by hand, and the order of what is timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compress.evalsuite.efficiency import HighWater, Pass, kv_bytes, mean_pass, random_prompt, timed_pass
from models import build_model
from packed_cache import PackedLayer, packed_cache
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

COUNTER = 8  # a sliding layer's copy of its window's size, an int64


@pytest.mark.parametrize("length", [2, 7, 33])
def test_a_dynamic_cache(length: int) -> None:
    model = build_model("llama")  # 3 layers, 2 KV heads of 16
    assert kv_bytes(model, random_prompt(model, length, 0)) == 3 * 2 * 2 * 16 * length * 4
    assert kv_bytes(model.half(), random_prompt(model, length, 0)) == 3 * 2 * 2 * 16 * length * 2


@pytest.mark.parametrize("length", [5, 8, 21])
def test_a_sliding_cache_holds_its_window(length: int) -> None:
    model = build_model("mistral")  # 3 layers, 2 KV heads of 24, a window of 8
    kept = min(length, 8)
    assert kv_bytes(model, random_prompt(model, length, 0)) == 3 * (2 * 2 * 24 * kept * 4 + COUNTER)


def test_sliding_and_full_layers() -> None:
    model = build_model("qwen2")  # 3 layers, 2 KV heads of 12, all but the first with a window of 8
    full, sliding = 2 * 2 * 12 * 30 * 4, 2 * 2 * 12 * 8 * 4
    assert kv_bytes(model, random_prompt(model, 30, 0)) == full + 2 * (sliding + COUNTER)


@pytest.mark.parametrize("length", [3, 40])
def test_packed_words_and_scales(length: int) -> None:
    model = build_model("llama")
    words, scales, zeros = 2 * 2 * length * 16 // 8 * 4, 2 * 2 * length * 2, 2 * 2 * length * 2
    assert kv_bytes(model, random_prompt(model, length, 0), packed_cache) == 3 * (words + scales + zeros)


def test_a_cache_made_beforehand_counts_its_capacity() -> None:
    model = build_model("llama")

    def make() -> Cache:
        return StaticCache(config=model.config, max_cache_len=64)

    found = kv_bytes(model, random_prompt(model, 10, 0), make)
    assert found - 3 * 2 * 2 * 16 * 64 * 4 in range(0, 3 * 64)  # and counters


def test_a_quantized_cache_of_transformers() -> None:
    model = build_model("llama")
    found = kv_bytes(model, random_prompt(model, 10, 0), lambda: QuantizedCache("fp8", model.config))
    assert found == 3 * 2 * (2 * 16 * 10 + 4)  # a byte an element and a float32 scale a tensor


class Recorder:
    """Stands in for a model's ``forward`` and notes what it was called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []
        self.forward = model.forward

    def __call__(self, ids: Tensor, **others: Any) -> Any:
        held = others["past_key_values"]
        self.calls.append((ids.tolist(), type(held), 0 if held is None else held.get_seq_length()))
        return self.forward(ids, **others)


@pytest.mark.parametrize(("cache", "kind"), [(None, type(None)), (packed_cache, Cache)])
def test_a_pass_is_a_greedy_answer(
    monkeypatch: pytest.MonkeyPatch, cache: Callable[[], Cache] | None, kind: type
) -> None:
    model = build_model("llama")
    prompt = random_prompt(model, 6, 1)
    recorder = Recorder(model)
    monkeypatch.setattr(model, "forward", recorder)
    done = timed_pass(model, prompt, 4, cache)
    assert [held for *_, held in recorder.calls] == [0, 6, 7, 8]
    assert recorder.calls[0][:2] == (prompt.tolist(), kind)
    assert 0 < done.prefill <= done.first_token
    assert done.decode > 0
    monkeypatch.undo()
    if cache is None:
        answer = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 6:]
        assert [ids[0][0] for ids, *_ in recorder.calls[1:]] == answer[:3].tolist()


def test_a_packed_cache_decodes_what_it_stored() -> None:
    model = build_model("llama")
    prompt = random_prompt(model, 20, 2)
    with torch.no_grad():
        exact = model(prompt, past_key_values=DynamicCache(config=model.config)).logits
        packed = model(prompt, past_key_values=packed_cache()).logits
    assert 0 < (exact - packed).abs().max() < 0.5 * exact.abs().max()
    assert PackedLayer.is_croppable is False


def test_prompts_are_seeded_and_within_the_vocabulary() -> None:
    model = build_model("llama")
    prompt = random_prompt(model, 400, 3)
    assert prompt.shape == (1, 400)
    assert torch.equal(prompt, random_prompt(model, 400, 3))
    assert not torch.equal(prompt, random_prompt(model, 400, 4))
    assert prompt.min() >= 0
    assert 250 < prompt.max() < 300


def test_the_mean_of_passes() -> None:
    assert mean_pass([Pass(1.0, 2.0, 3.0), Pass(3.0, 4.0, 5.0)]) == Pass(2.0, 3.0, 4.0)


def test_high_water_sees_what_is_gone_and_forgets_it_when_told() -> None:
    water = HighWater(torch.device("cpu"))
    before = water.peak()
    if before is None:
        pytest.skip("this system doesn't record the peak of resident memory")
    water.reset()
    torch.ones(64 << 18)  # 64 MiB, gone at once
    raised = water.peak()
    assert raised is not None
    assert raised >= 60 << 20
    if water.resettable:
        water.reset()
        lower = water.peak()
        assert lower is not None
        assert lower <= raised - (50 << 20)
