"""The fused way of answering one token, when it is taken, and the cache with room."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from compress.evalsuite.efficiency import allocated, kv_bytes
from compress.kernels import native
from models import CONFIGS
from runs import distance, quick
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.kv.growing import STEP
from compress.runtime import GrowingCache, load

Tiny = Callable[[str], Path]
Models = Callable[[str], PreTrainedModel]
needs_native = pytest.mark.skipif(native.library() is None, reason="the C++ kernels aren't compiled here")


@pytest.fixture(scope="module")
def models(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``models(name)``: a quick artifact of a tiny model, loaded once; tests leave it as it was."""
    made: dict[str, PreTrainedModel] = {}

    def make(name: str) -> PreTrainedModel:
        if name not in made:
            out = tmp_path_factory.mktemp("decoder") / "out"
            made[name] = load(quick(tiny(name), "rtn", out, text, "weights.lm_head_bits=8").out)[0]
        return made[name]

    return make


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens a call of the layers' own forward, which the fused way leaves out; counted without a hook."""
    found: list[int] = []
    layer = model.model.layers[0].mlp
    kind = type(layer)
    plain = kind.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if self is layer:
            found.append(x.shape[1])
        return plain(self, x)

    kind.forward = forward  # of the class: an instance's own is a reason for the plain way
    try:
        yield found
    finally:
        kind.forward = plain


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepwise(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Logits of the last 4 tokens, each given by itself."""
    past = model(ids[:, :-4], attention_mask=None if mask is None else mask[:, :-4], use_cache=True).past_key_values
    found = []
    for at in range(ids.shape[1] - 4, ids.shape[1]):
        seen = None if mask is None else mask[:, : at + 1]
        output = model(ids[:, at : at + 1], attention_mask=seen, past_key_values=past, use_cache=True, **kwargs)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def at_once(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False).logits[:, -4:]


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_steps_are_the_plain_way(models: Models, name: str) -> None:
    model, ids = models(name), tokens(3, 21)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :9] = 0
    with counted(model) as plain:
        for seen in (None, mask):
            positions = None if seen is None else (seen.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                expected = model(ids, attention_mask=seen, position_ids=positions, use_cache=False).logits[:, -4:]
            past = model(
                ids[:, :-4],
                attention_mask=None if seen is None else seen[:, :-4],
                position_ids=None if positions is None else positions[:, :-4],
                use_cache=True,
            ).past_key_values
            for at in range(4):
                end = 17 + at
                found = model(
                    ids[:, end : end + 1],
                    attention_mask=None if seen is None else seen[:, : end + 1],
                    position_ids=None if positions is None else positions[:, end : end + 1],
                    past_key_values=past,
                ).logits
                assert distance(found[:, 0], expected[:, at]) < 1e-4
    assert plain == [21, 17, 21, 17]


@needs_native
def test_where_the_plain_way_is_taken(models: Models) -> None:
    model, ids = copy.deepcopy(models("llama")), tokens(2, 12)  # hidden states leave hooks
    expected = at_once(model, ids)

    def plain_calls(**kwargs: Any) -> int:
        with counted(model) as plain:
            assert distance(stepwise(model, ids, **kwargs), expected) < 1e-4
        return len(plain) - 1

    assert plain_calls() == 0
    assert plain_calls(output_attentions=False) == 0
    assert plain_calls(output_hidden_states=True) == 4
    hook = model.model.layers[2].self_attn.k_proj.register_forward_hook(lambda *_: None)
    assert plain_calls() == 4
    hook.remove()
    model.set_attn_implementation("eager")
    assert plain_calls() == 4
    model.set_attn_implementation("sdpa")
    with counted(model) as plain:
        stepwise(model, tokens(9, 12))
    assert plain == [8, 1, 1, 1, 1]
    past = model(ids, use_cache=True).past_key_values
    assert len(model(ids[:, :1], past_key_values=past, output_hidden_states=True).hidden_states) == 4


@needs_native
def test_an_exchanged_part_is_used(models: Models) -> None:
    model, ids = copy.deepcopy(models("llama")), tokens(1, 12)
    before = stepwise(model, ids)
    assert torch.equal(before, stepwise(models("llama"), ids))
    layer = model.model.layers[1].mlp.up_proj
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight.data = 2 * layer.dequantize()
    model.model.layers[1].mlp.up_proj = dense
    assert distance(stepwise(model, ids), before) > 1e-2
    assert distance(stepwise(model, ids), at_once(model, ids)) < 1e-4


def half(model: PreTrainedModel) -> type[Any]:
    """A subclass of the attention that answers half of it."""

    class Half(type(model.model.layers[1].self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            mixed, weights = super().forward(*args, **kwargs)
            return 0.5 * mixed, weights

    return Half


def exchange_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def exchange_attention(model: PreTrainedModel) -> None:
    layer = model.model.layers[1]
    new = half(model)(model.config, 1).eval()
    new._modules.update(layer.self_attn._modules)
    layer.self_attn = new


def exchange_class(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.__class__ = half(model)


def patch_forward(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        mixed, weights = plain(*args, **kwargs)
        return 0.5 * mixed, weights

    attention.forward = forward


def exchange_gain(model: PreTrainedModel) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight = nn.Parameter(torch.full_like(norm.weight, 3), requires_grad=False)


def exchange_data(model: PreTrainedModel) -> None:
    gain = model.model.layers[1].input_layernorm.weight
    gain.data = torch.full_like(gain, 3)


EXCHANGES = (exchange_activation, exchange_attention, exchange_class, patch_forward, exchange_gain, exchange_data)


@needs_native
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_exchange_is_seen(models: Models, exchange: Callable[[PreTrainedModel], None]) -> None:
    model, ids = copy.deepcopy(models("llama")), tokens(1, 12)
    with counted(model) as plain:
        before = stepwise(model, ids)
    assert plain == [8]
    exchange(model)
    found = stepwise(model, ids)
    assert distance(found, before) > 1e-3
    assert distance(found, at_once(model, ids)) < 1e-4


@needs_native
def test_a_global_hook_is_called(models: Models) -> None:
    model, ids = models("llama"), tokens(1, 12)
    stepwise(model, ids)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        stepwise(model, ids)
    finally:
        handle.remove()
    assert sum(module is model.model.layers[0].mlp for module in seen) == 5


@needs_native
def test_gradients_arrive(models: Models) -> None:
    model, ids = copy.deepcopy(models("llama")), tokens(1, 9)
    gain = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    found = []
    for split in (0, 8):
        past = model(ids[:, :split], use_cache=True).past_key_values if split else None
        gain.grad = None
        model(ids[:, split:], past_key_values=past).logits[:, -1].square().sum().backward()
        assert gain.grad is not None
        found.append(gain.grad)
    assert distance(found[1], found[0]) < 1e-3


@needs_native
def test_what_the_embedding_gave_stays_and_its_gradient_arrives(models: Models) -> None:
    model, ids = copy.deepcopy(models("llama")), tokens(1, 9)
    with torch.no_grad():
        past = model(ids[:, :8], use_cache=True).past_key_values
    given: list[Tensor] = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda _, __, output: given.extend([output, output.clone()])
    )
    with torch.no_grad():
        model(ids[:, 8:], past_key_values=past)
    handle.remove()
    assert torch.equal(*given)
    past.crop(-1)
    given.clear()

    def wanted(_: nn.Module, __: Any, output: Tensor) -> None:
        given.append(output.requires_grad_(True))

    model.model.embed_tokens.register_forward_hook(wanted)
    model(ids[:, 8:], past_key_values=copy.deepcopy(past)).logits.square().sum().backward()
    assert len(given) == 1
    assert given[0].grad is not None
    assert given[0].grad.abs().max() > 0


@needs_native
def test_threads_share_a_cold_model(models: Models) -> None:
    warm = models("llama")
    prompts = [tokens(1, 6, seed) for seed in range(4)]

    def text(model: PreTrainedModel, prompt: Tensor) -> list[int]:
        generated: Tensor = model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        return generated[0].tolist()

    expected = [text(warm, prompt) for prompt in prompts]
    cold, start = copy.deepcopy(warm), Barrier(4)

    def begin(prompt: Tensor) -> list[int]:
        start.wait()
        return text(cold, prompt)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(begin, prompts)) == expected


@needs_native
def test_another_attention_function_is_called(models: Models) -> None:
    model, ids = models("mistral"), tokens(2, 20)
    expected, calls = stepwise(model, ids), []

    def counting(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[2], kwargs["sliding_window"]))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    AttentionMaskInterface.register("counting", sdpa_mask)
    model.set_attn_implementation("counting")
    try:
        assert distance(stepwise(model, ids), expected) < 1e-4
    finally:
        model.set_attn_implementation("sdpa")
    assert calls == [(16, 8)] * 3 + [(1, 8)] * 12


@needs_native
def test_masks_of_the_caller(models: Models) -> None:
    model, ids = models("llama_untied"), tokens(2, 9)
    hidden = torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    for mask in (hidden, hidden[:1], torch.where(hidden, -1e9, 0.0), hidden.expand(2, 4, 1, 9)):
        found = []
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            seen = mask if mask.dtype == torch.bool and name == "sdpa" else mask.float()
            if mask.dtype == torch.bool and name == "eager":
                seen = torch.where(mask, 0.0, -1e9)
            with torch.no_grad():
                past = model(ids[:, :8], use_cache=True).past_key_values
                found.append(model(ids[:, 8:], attention_mask=seen, past_key_values=past).logits)
        model.set_attn_implementation("sdpa")
        assert distance(*found) < 1e-4


def test_without_a_compiler(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = copy.deepcopy(models("qwen2")), tokens(2, 12)
    expected = stepwise(models("qwen2"), ids)
    monkeypatch.setattr(native, "library", lambda: None)
    with counted(model) as plain:
        assert distance(stepwise(model, ids), expected) < 1e-4
    assert plain == [8, 1, 1, 1, 1]
    assert "path=reference" in repr(model.model.layers[0].mlp)


def test_the_cache_grows_in_steps_and_is_counted(models: Models) -> None:
    model = models("llama")
    ids = tokens(1, STEP + 1)
    per_token = 2 * 3 * 2 * 16 * 4
    assert kv_bytes(model, ids[:, :STEP]) == STEP * per_token
    assert kv_bytes(model, ids) == 2 * STEP * per_token
    assert kv_bytes(model, ids, lambda: DynamicCache(config=model.config)) == (STEP + 1) * per_token
    past = model(ids, use_cache=True).past_key_values
    where = past.layers[0].keys.data_ptr()
    assert isinstance(past, GrowingCache)
    model(ids[:, :1], past_key_values=past)
    assert past.layers[0].keys.data_ptr() == where
    assert past.get_seq_length() == STEP + 2
    assert allocated(past).nbytes == 2 * STEP * per_token


CHANGES: dict[str, Callable[[Any], None]] = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_cache_holds_what_transformers_does(models: Models, name: str, change: str) -> None:
    config = models(name).config
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingCache(config), DynamicCache(config=config)
    for number, count in enumerate((4, 1, STEP, 1, 1)):
        batch = 3 if number < 3 else theirs.layers[0].keys.shape[0] if change != "reset" else 3
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, batch, 2, count, 8, generator=generator)
            for found, expected in zip(
                ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True
            ):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if number == 2 and (name != "mistral" or change != "crop"):
            for cache in (ours, theirs):
                CHANGES[change](cache)
            assert ours.get_seq_length() == theirs.get_seq_length()


def test_an_old_view_is_not_written_over_by_a_copy(models: Models) -> None:
    model, ids = models("qwen3"), tokens(1, 10)
    past = model(ids, use_cache=True).past_key_values
    other = copy.deepcopy(past)
    kept = past.layers[0].keys.clone()
    model(ids[:, :1], past_key_values=other)
    past.crop(-2)
    model(ids[:, 8:], past_key_values=past)
    torch.testing.assert_close(past.layers[0].keys, kept)
    assert other.get_seq_length() == 11


def test_a_cache_of_inference_mode_goes_on_outside_of_it(models: Models) -> None:
    model, ids = models("llama"), tokens(1, 6)
    with torch.inference_mode():
        past = model(ids[:, :5], use_cache=True).past_key_values
    with torch.no_grad():
        found = model(ids[:, 5:], past_key_values=past).logits
        assert distance(found, model(ids, use_cache=False).logits[:, -1:]) < 1e-4
