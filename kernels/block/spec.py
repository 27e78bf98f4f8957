"""What the proofs need of `block`: a decoder layer's two fused steps, the end of a model, and decoding's attention.

The first argument of every case names the part. There is no Triton kernel: on a GPU the runtime doesn't fuse the step,
its layers call `quant_linear` on their own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from compress.kernels import block as op
from compress.kernels import native
from compress.kernels.block import cpu, reference
from compress.kernels.block.reference import Block, Linear
from compress.kernels.proofs import Case, OpSpec
from compress.kernels.quant_linear.spec import exact_weights
from compress.kernels.quant_linear.weight import from_codes
from torch import Generator, Tensor

Part = Literal["before", "queries", "values", "after", "head", "attention", "row", "mix"]
Result = Tensor | tuple[Tensor, ...]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 3, 1, 32, 96, 160
EPSILON = 1e-5


def _public(part: Part, *arguments: Any) -> Result:
    if part == "before":
        return op.prepared(arguments[0]).before(*arguments[1:])
    if part == "queries":
        return op.prepared(arguments[0]).queries(*arguments[1:])
    if part == "values":
        return op.prepared(arguments[0]).values(*arguments[1:])
    if part == "row":
        return op.attention_row(*arguments)
    if part == "mix":
        return op.attention_mix(*arguments)
    if part == "after":
        return op.prepared(arguments[0]).after(arguments[1], arguments[2].clone())
    if part == "head":
        return op.prepared_head(*arguments[:3])(arguments[3])
    return op.decode_attention(*arguments)


def _native(build: str, part: Part, *arguments: Any) -> Result:
    library = native.built(build)
    assert library is not None
    if part == "before":
        return cpu.NativeBlock(arguments[0], library).before(*arguments[1:])
    if part in ("queries", "values"):
        return getattr(cpu.NativeBlock(arguments[0], library), part)(*arguments[1:])
    if part == "row":
        q, k, v, mask, scaling = arguments
        return cpu.attention_row(q, k, v, mask, scaling, library)
    if part == "mix":
        weights, values, head_map = arguments
        return cpu.attention_mix(weights, values, head_map, library)
    if part == "after":
        return cpu.NativeBlock(arguments[0], library, threads=2).after(arguments[1], arguments[2].clone())
    if part == "head":
        layer, norm, epsilon, hidden = arguments
        return cpu.NativeHead(layer, norm, epsilon, library)(hidden)
    q, k, v, mask, scaling = arguments
    return cpu.decode_attention(q, k, v, mask, scaling, library)


def _reference(part: Part, *arguments: Any) -> Result:
    parts: dict[Part, Callable[..., Result]] = {
        "before": reference.before,
        "queries": reference.queries,
        "values": reference.values,
        "row": reference.attention_row,
        "mix": reference.attention_mix,
        "after": reference.after,
        "head": reference.norm_linear,
        "attention": reference.decode_attention,
    }
    return parts[part](*arguments)


def _exact(part: Part, *arguments: Any) -> Result:
    """From first principles in float64: RoPE as a complex turn, attention row by row."""
    parts: dict[Part, Callable[..., Result]] = {
        "before": _exact_before,
        "queries": lambda block, *rest: _exact_before(replace(block, k=block.q, v=block.q, k_norm=None), *rest)[0],
        "values": lambda block, hidden: _exact_values(block, hidden),
        "row": _exact_row,
        "mix": _exact_mix,
        "after": _exact_after,
        "head": lambda layer, norm, epsilon, hidden: _exact_linear(layer, _exact_norm(hidden, norm, epsilon)),
        "attention": _exact_attention,
    }
    return parts[part](*arguments)


def _exact_before(block: Block, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    x = _exact_norm(hidden, block.attention_norm, block.epsilon)
    q, k, v = (_exact_linear(layer, x).unflatten(-1, (-1, block.head_dim)) for layer in (block.q, block.k, block.v))
    half = block.rotary_dim // 2
    turn = torch.complex(cos.double(), sin.double())[:, None, :half]

    def turned(heads: Tensor, norm: Tensor | None) -> Tensor:
        heads = heads if norm is None else _exact_norm(heads, norm, block.epsilon)
        pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * turn
        return torch.cat([pairs.real, pairs.imag, heads[..., 2 * half :]], -1)

    return turned(q, block.q_norm), turned(k, block.k_norm), v


def _exact_values(block: Block, hidden: Tensor) -> Tensor:
    x = _exact_norm(hidden, block.attention_norm, block.epsilon)
    return _exact_linear(block.v, x).unflatten(-1, (-1, block.head_dim))


def _exact_after(block: Block, attention: Tensor, hidden: Tensor) -> Tensor:
    x = hidden.double() + _exact_linear(block.o, attention)
    normed = _exact_norm(x, block.mlp_norm, block.epsilon)
    gate = _exact_linear(block.gate, normed)
    if block.act == "silu":
        gate = gate / (1 + (-gate).exp())
    else:
        gate = gate / 2 * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    return x + _exact_linear(block.down, gate * _exact_linear(block.up, normed))


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    out = torch.zeros(*q.shape[:2], v.shape[3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        added = torch.zeros(k.shape[2], dtype=torch.float64)
        if mask is not None:
            added = mask[b].double().log() if mask.dtype == torch.bool else mask[b].double()
        seen = added > -math.inf
        if seen.any():
            scores = k[b, h // group, seen].double() @ q[b, h].double() * scaling + added[seen]
            out[b, h] = scores.softmax(0) @ v[b, h // group, seen].double()
    return out


def _exact_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, ...]:
    """The probabilities as the attention of one-hot values."""
    tokens = k.shape[2]
    onehot = torch.eye(tokens).expand(*k.shape[:2], tokens, tokens)
    return _exact_attention(q, k, v, mask, scaling), _exact_attention(q, k, onehot, mask, scaling)


def _exact_mix(weights: Tensor, v: Tensor, head_map: Tensor | None) -> Tensor:
    heads = range(weights.shape[1]) if head_map is None else head_map.tolist()
    group = weights.shape[1] // v.shape[1]
    rows = [weights[:, row].double()[:, None] @ v[:, head // group].double() for head, row in enumerate(heads)]
    return torch.cat(rows, 1)


def _exact_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + epsilon).sqrt() * weight.double()


def _exact_linear(layer: Linear | None, x: Tensor) -> Tensor:
    assert layer is not None
    weight = layer.weight.double() if isinstance(layer.weight, Tensor) else exact_weights(layer.weight)
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())


def _packed(g: Generator, shape: tuple[int, int], bits: int, size: int, more: bool = False) -> Linear:
    """Random codes and scales; with ``more`` also zero points and a bias."""
    rows, columns = shape
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=g)
    scale = torch.randn(rows, columns // size, generator=g).half() / (columns**0.5 * (1 << (bits - 1)))
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=g) if more else None
    bias = torch.randn(rows, generator=g) if more else None
    return Linear(from_codes(codes, scale, zero, bits, size, "rows"), bias)


def _plain(g: Generator, shape: tuple[int, int], dtype: torch.dtype) -> Linear:
    return Linear((torch.randn(shape, generator=g) / shape[1] ** 0.5).to(dtype))


def _block(g: Generator, **changes: Any) -> Block:
    """A layer with every width, group sizes that need padding, and plain matrices of every dtype."""
    made = Block(
        q=_packed(g, (HEADS * HEAD_DIM, HIDDEN), 4, 32, more=True),
        k=_packed(g, (KV_HEADS * HEAD_DIM, HIDDEN), 8, 96),
        v=_packed(g, (KV_HEADS * HEAD_DIM, HIDDEN), 3, 48),
        o=_plain(g, (HIDDEN, HEADS * HEAD_DIM), torch.float16),
        gate=_packed(g, (INNER, HIDDEN), 2, 32),
        up=_plain(g, (INNER, HIDDEN), torch.bfloat16),
        down=_packed(g, (HIDDEN, INNER), 4, 160),
        attention_norm=torch.rand(HIDDEN, generator=g) + 0.5,
        mlp_norm=torch.rand(HIDDEN, generator=g) + 0.5,
        q_norm=torch.rand(HEAD_DIM, generator=g) + 0.5,
        k_norm=torch.rand(HEAD_DIM, generator=g) + 0.5,
        epsilon=EPSILON,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
    )
    return replace(made, **changes)


def _before(name: str, count: int, **changes: Any) -> Case:
    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        block, hidden = _block(g, **changes), torch.randn(count, HIDDEN, generator=g)
        angles = torch.randn(count, block.rotary_dim // 2, generator=g).repeat(1, 2)
        return "before", block, hidden, angles.cos(), angles.sin()

    return Case(f"before-{name}", make, (torch.float32,))


def _after(name: str, count: int, **changes: Any) -> Case:
    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        block, attention = _block(g, **changes), torch.randn(count, HEADS * HEAD_DIM, generator=g)
        return "after", block, attention, torch.randn(count, HIDDEN, generator=g)

    return Case(f"after-{name}", make, (torch.float32,))


def _head(name: str, count: int, layer: Callable[[Generator], Linear]) -> Case:
    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        made, norm = layer(g), torch.rand(HIDDEN, generator=g) + 0.5
        return "head", made, norm, EPSILON, torch.randn(count, HIDDEN, generator=g)

    return Case(f"head-{name}", make, (torch.float32,))


def _attention(name: str, heads: tuple[int, int], sizes: tuple[int, int, int], mask: str = "none") -> Case:
    """With ``heads`` (H, Hkv) and ``sizes`` (B, T, D); a masked batch's last sequence sees nothing."""

    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        batch, tokens, size = sizes
        q = torch.randn(batch, heads[0], size, generator=g)
        cache = torch.randn(batch, heads[1], tokens + 9, 2 * size, generator=g)  # k and v are views into a larger one
        seen = torch.rand(batch, tokens, generator=g) < 0.6
        seen[-1] = False
        penalty = torch.randn(batch, tokens, generator=g).masked_fill(~seen, -math.inf)
        given = {"none": None, "bool": seen, "float": penalty}[mask]
        return "attention", q, cache[:, :, :tokens, :size], cache[:, :, :tokens, size:], given, size**-0.5

    return Case(f"attention-{name}", make, (torch.float32,))


def _taking(part: Literal["queries", "values"], count: int) -> Case:
    """Of a layer that takes from an earlier one, and lacks what it takes."""
    gone = ("k", "v") if part == "queries" else ("q", "k")

    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        lacking: dict[str, Any] = dict.fromkeys(gone)
        block = replace(_block(g), **lacking)
        hidden, angles = torch.randn(count, HIDDEN, generator=g), torch.randn(count, HEAD_DIM // 2, generator=g)
        tables = (angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()) if part == "queries" else ()
        return part, block, hidden, *tables

    return Case(part, make, (torch.float32,))


def _mix(name: str, heads: tuple[int, int], sizes: tuple[int, int, int], mapped: bool) -> Case:
    def make(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        batch, tokens, size = sizes
        weights = torch.randn(batch, heads[0], tokens, generator=g).softmax(-1)
        cache = torch.randn(batch, heads[1], tokens + 9, size, generator=g)
        head_map = torch.randint(heads[0], (heads[0],), generator=g) if mapped else None
        return "mix", weights, cache[:, :, :tokens], head_map

    return Case(f"mix-{name}", make, (torch.float32,))


def _row(case: Case) -> Case:
    """The same attention, with its probabilities."""
    return Case(case.name.replace("attention", "row"), lambda g, dtype: ("row", *case.make(g, dtype)[1:]), case.dtypes)


SPEC = OpSpec(
    name="block",
    public=_public,
    reference=_reference,
    exact=_exact,
    triton=None,
    cpu=_native,
    cases=(
        _before("one-token", 1),
        _before("some-tokens", 3, q_norm=None, k_norm=None),
        _before("part-of-a-head-turns", 9, rotary_dim=16),
        _before("nothing-turns", 1, rotary_dim=0),
        _before("no-token", 0),
        _after("one-token", 1),
        _after("gelu-some-tokens", 9, act="gelu_tanh"),
        _after("no-token", 0),
        _head("w8", 1, lambda g: _packed(g, (70, HIDDEN), 8, 96)),
        _head("w2-zero-points", 5, lambda g: _packed(g, (33, HIDDEN), 2, 24, more=True)),
        _head("plain-float16", 2, lambda g: _plain(g, (70, HIDDEN), torch.float16)),
        _head("no-token", 0, lambda g: _plain(g, (70, HIDDEN), torch.float32)),
        _attention("one-token", (6, 2), (1, 1, 20)),
        _attention("grouped", (8, 2), (2, 67, 64)),
        _attention("padding", (3, 1), (3, 130, 24), mask="bool"),
        _attention("added-mask", (4, 4), (2, 40, 8), mask="float"),
        _taking("queries", 3),
        _taking("values", 2),
        _row(_attention("grouped", (8, 2), (2, 67, 64))),
        _row(_attention("padding", (3, 1), (3, 130, 24), mask="bool")),
        _row(_attention("added-mask", (4, 4), (2, 40, 8), mask="float")),
        _mix("grouped", (9, 3), (2, 67, 64), mapped=False),
        _mix("many-to-one", (4, 2), (3, 33, 24), mapped=True),
    ),
)
