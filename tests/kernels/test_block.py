"""The fused decode step: C++ in every runnable build against plain PyTorch, and that against transformers."""

from dataclasses import replace

import pytest
import torch
from compress.kernels import block as op
from compress.kernels import native
from compress.kernels.block import cpu, reference
from compress.kernels.block.reference import Block, Linear
from compress.kernels.quant_linear.weight import dequantize, from_codes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BUILDS = native.runnable()
HIDDEN, HEADS, KV_HEADS, HEAD, INNER = 96, 3, 1, 32, 160


def packed(rows: int, columns: int, bits: int, size: int = 32, bias: bool = False) -> Linear:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.randn(rows, columns // size) / (columns**0.5 * (1 << (bits - 1)))).half()
    return Linear(from_codes(codes, scale, None, bits, size, "rows"), torch.randn(rows) if bias else None)


def plain(rows: int, columns: int, dtype: torch.dtype) -> Linear:
    return Linear((torch.randn(rows, columns) / columns**0.5).to(dtype))


def make(head_norms: bool = False, rotary: int = HEAD) -> Block:
    """Layers of every width, one with a bias, and plain ones of every dtype."""
    norms = (torch.rand(HEAD) + 0.5, torch.rand(HEAD) + 0.5) if head_norms else (None, None)
    return Block(
        q=packed(HEADS * HEAD, HIDDEN, 4, bias=True),
        k=packed(KV_HEADS * HEAD, HIDDEN, 8),
        v=packed(KV_HEADS * HEAD, HIDDEN, 3, size=48),
        o=plain(HIDDEN, HEADS * HEAD, torch.float16),
        gate=packed(INNER, HIDDEN, 2),
        up=plain(INNER, HIDDEN, torch.bfloat16),
        down=packed(HIDDEN, INNER, 4, size=160),
        attention_norm=torch.rand(HIDDEN) + 0.5,
        mlp_norm=torch.rand(HIDDEN) + 0.5,
        q_norm=norms[0],
        k_norm=norms[1],
        epsilon=1e-5,
        head_dim=HEAD,
        rotary_dim=rotary,
    )


def turns(count: int, rotary: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(count, rotary // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


def close(found: Tensor, wanted: Tensor, limit: float = 2e-6) -> bool:
    return bool((found - wanted).norm() <= limit * wanted.norm())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("rotary", [HEAD, 16, 0])
def test_both_halves_equal_the_reference(build: native.Library, head_norms: bool, rotary: int) -> None:
    for act in ("silu", "gelu_tanh"):
        block = replace(make(head_norms, rotary), act=act)
        layer = cpu.NativeBlock(block, build, threads=2)
        for count in (1, 3, 8):
            hidden, (cos, sin) = torch.randn(count, HIDDEN), turns(count, rotary)
            for found, wanted in zip(
                layer.before(hidden, cos, sin), reference.before(block, hidden, cos, sin), strict=True
            ):
                assert found.shape == wanted.shape
                assert close(found, wanted)
            attention = torch.randn(count, HEADS * HEAD)
            assert close(layer.after(attention, hidden.clone()), reference.after(block, attention, hidden))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_int8_activations(build: native.Library) -> None:
    block = replace(make(), activations="int8")
    layer = cpu.NativeBlock(block, build)
    hidden, (cos, sin) = torch.randn(2, HIDDEN), turns(2, HEAD)
    for found, wanted in zip(layer.before(hidden, cos, sin), reference.before(block, hidden, cos, sin), strict=True):
        assert close(found, wanted, 2e-3)  # an activation at the border of two steps may go either way
    attention = torch.randn(2, HEADS * HEAD)
    found = layer.after(attention, hidden.clone())
    assert close(found, reference.after(block, attention, hidden), 2e-3)
    assert not close(found, reference.after(replace(block, activations="float"), attention, hidden), 1e-4)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_threads_change_no_bit(build: native.Library, activations: str) -> None:
    block = replace(make(head_norms=True), activations=activations)
    hidden, (cos, sin), attention = torch.randn(3, HIDDEN), turns(3, HEAD), torch.randn(3, HEADS * HEAD)
    one, three = (cpu.NativeBlock(block, build, threads) for threads in (1, 3))
    for found, wanted in zip(three.before(hidden, cos, sin), one.before(hidden, cos, sin), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(three.after(attention, hidden.clone()), one.after(attention, hidden.clone()))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("layer", [packed(70, 64, 8), plain(70, 50, torch.float32), plain(70, 50, torch.float16)])
def test_the_end_of_a_model(build: native.Library, layer: Linear) -> None:
    columns = layer.weight.shape[1]
    norm = torch.rand(columns) + 0.5
    head = cpu.NativeHead(layer, norm, 1e-6, build)
    for count in (1, 5):
        hidden = torch.randn(count, columns)
        assert close(head(hidden), reference.norm_linear(layer, norm, 1e-6, hidden))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
@pytest.mark.parametrize("tokens", [1, 17, 200])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_decode_attention(build: native.Library, tokens: int, kind: str) -> None:
    q = torch.randn(2, 6, 20)
    cache = torch.randn(2, 2, tokens + 9, 40)  # a view into a larger cache
    k, v = cache[:, :, :tokens, :20], cache[:, :, :tokens, 20:]
    mask = None
    if kind != "none":
        kept = torch.rand(2, tokens) < 0.6
        kept[:, -1] = True
        mask = kept if kind == "bool" else torch.zeros(2, tokens).masked_fill(~kept, -torch.inf)
    found = cpu.decode_attention(q, k, v, mask, 0.3, build)
    assert close(found, reference.decode_attention(q, k, v, mask, 0.3))
    if mask is not None:
        mask[1] = False if kind == "bool" else -torch.inf
        found = cpu.decode_attention(q, k, v, mask, 0.3, build)
        assert torch.equal(found[1], torch.zeros(6, 20))
        assert close(found, reference.decode_attention(q, k, v, mask, 0.3))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_large_scores(build: native.Library) -> None:
    q, k, v = torch.full((1, 1, 4), 100.0), torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4)
    found = cpu.decode_attention(q, k, v, None, 1.0, build)
    assert close(found, reference.decode_attention(q, k, v, None, 1.0), 1e-4)


def test_a_llama_layer_of_transformers_is_this_block() -> None:
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, num_hidden_layers=1,
        vocab_size=60, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer, head = model.model.layers[0], model.lm_head
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    block = Block(
        *(Linear(part.weight) for part in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        layer.input_layernorm.weight, layer.post_attention_layernorm.weight, None, None, 1e-5, 12, 12,
    )  # fmt: skip
    ids = torch.randint(0, 60, (2, 5))
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(5)[None])
    k, v = torch.empty(2, 2, 5, 12), torch.empty(2, 2, 5, 12)
    step = op.prepared(block)
    for t in range(5):
        x = hidden[:, t].contiguous()
        turn = (cos[0, t].expand(2, 12).contiguous(), sin[0, t].expand(2, 12).contiguous())
        q, k[:, :, t], v[:, :, t] = step.before(x, *turn)
        seen = op.decode_attention(q, k[:, :, : t + 1], v[:, :, : t + 1], None, 12**-0.5)
        x = step.after(seen.view(2, 48), x)
    logits = op.prepared_head(Linear(head.weight), model.model.norm.weight, 1e-5)(x)
    assert close(logits, model(ids).logits[:, -1], 1e-5)


def test_tensors_that_do_not_fit_are_named() -> None:
    build = BUILDS[-1]
    block = make()
    with pytest.raises(ValueError, match=r"down of a block has shape .* expected \[96, 160\]"):
        cpu.NativeBlock(replace(block, down=packed(HIDDEN, HIDDEN, 4)), build)
    with pytest.raises(ValueError, match="rotary_dim=33"):
        cpu.NativeBlock(replace(block, rotary_dim=33), build)
    with pytest.raises(ValueError, match="mlp_norm must be contiguous float32"):
        cpu.NativeBlock(replace(block, mlp_norm=block.mlp_norm.half()), build)
    layer = cpu.NativeBlock(block, build)
    with pytest.raises(ValueError, match=r"hidden must be contiguous float32 of shape \[1, 96\]"):
        layer.before(torch.randn(1, 95), *turns(1, HEAD))
    with pytest.raises(ValueError, match=r"cos must be .*\[1, 32\]"):
        layer.before(torch.randn(1, HIDDEN), *turns(1, 16))
    with pytest.raises(ValueError, match=r"hidden must be .* on the CPU, got .* on meta"):
        layer.before(torch.empty(1, HIDDEN, device="meta"), *turns(1, HEAD))
    q, k = torch.randn(1, 2, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="k, v and the mask must be on the CPU, got cpu and meta"):
        cpu.decode_attention(q, k, k.to("meta"), None, 1.0, build)
    with pytest.raises(ValueError, match="the mask must be bool or float32"):
        cpu.decode_attention(q, k, k, torch.ones(1, 3, dtype=torch.int64), 1.0, build)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_cpp_does_not_read_takes_the_reference(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 8, dtype=dtype), torch.randn(1, 1, 3, 8, dtype=dtype)
    assert op.path(q) == "reference"
    assert torch.equal(op.decode_attention(q, k, k, None, 1.0), reference.decode_attention(q, k, k, None, 1.0))


def test_without_a_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden, (cos, sin) = make(), torch.randn(1, HIDDEN), turns(1, HEAD)
    layer, head = op.prepared(block), op.prepared_head(block.gate, block.mlp_norm, 1e-5)
    fast = layer.before(hidden, cos, sin)
    assert layer.path == head.path == op.path(hidden) == (f"native-{BUILDS[-1].name}" if BUILDS else "reference")
    monkeypatch.setattr(native, "library", lambda: None)
    assert op.path(hidden) == op.prepared(block).path == "reference"
    assert op.prepared_head(block.gate, block.mlp_norm, 1e-5).path == "reference"
    for found, wanted in zip(op.prepared(block).before(hidden, cos, sin), fast, strict=True):
        assert close(found, wanted)
    weight = block.q.weight
    assert not isinstance(weight, Tensor)
    assert dequantize(weight).shape == weight.shape
