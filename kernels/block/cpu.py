"""The C++ path of `block` (``kernels/native/block.h``): one call before a layer's attention and one after it.

A `NativeBlock` holds the addresses of a layer's tensors, so that a call costs a few microseconds beside its work.
"""

import ctypes
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from compress.kernels import dispatch
from compress.kernels.block.reference import Activations, Block, Linear
from compress.kernels.native import Library
from compress.kernels.quant_linear.structure import ACTIVATIONS, CompressLinear, describe
from torch import Tensor

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_GATES = {"silu": 0, "gelu_tanh": 1}
_LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
_SIZES = ("hidden", "heads", "kv_heads", "head_dim", "rotary_dim", "act", "activations", "threads")


class CompressBlock(ctypes.Structure):
    """`CompressBlock` of block.h."""

    _fields_ = (
        *((name, CompressLinear) for name in _LAYERS),
        *((name, _POINTER) for name in _NORMS),
        ("epsilon", ctypes.c_double),
        *((name, _SIZE) for name in _SIZES),
    )


class CompressAttention(ctypes.Structure):
    """`CompressAttention` of block.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "mask", "out")),
        *((name, _SIZE) for name in ("mask_kind", "mask_batch")),
        *((name, _SIZE) for name in ("k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token")),
        *((name, _SIZE) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim")),
        ("scaling", ctypes.c_double),
    )


class NativeBlock:
    """A decoder layer ready for the C++ functions of one build; keeps the layer's tensors alive.

    Raises:
        ValueError: a tensor of another dtype, layout or shape than `Block` says.
    """

    def __init__(self, block: Block, build: Library, threads: int = 1) -> None:
        hidden, heads = block.o.weight.shape[0], block.o.weight.shape[1] // block.head_dim
        own = block.v or block.k  # a layer that has neither takes them, and their number isn't its business
        kv_heads = heads if own is None else own.weight.shape[0] // block.head_dim
        _check(block, hidden, heads, kv_heads)
        self.block = block = _own_block(block)
        self._functions, self.path = declared(build), dispatch.native_path(build)
        self._heads, self._kv_heads, self._hidden = heads, kv_heads, hidden
        layers = [_described(getattr(block, name)) for name in _LAYERS]
        norms = [None if (norm := getattr(block, name)) is None else norm.data_ptr() for name in _NORMS]
        sizes = (hidden, heads, kv_heads, block.head_dim, block.rotary_dim)
        choices = (_GATES[block.act], ACTIVATIONS[block.activations], threads)
        self._structure = CompressBlock(*layers, *norms, block.epsilon, *sizes, *choices)

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`compress.kernels.block.reference.before`; float32 contiguous tensors."""
        count, size = hidden.shape[0], self.block.head_dim
        q = torch.empty(count, self._heads, size)
        k, v = torch.empty(count, self._kv_heads, size), torch.empty(count, self._kv_heads, size)
        self._before(hidden, cos, sin, q, k, v)
        return q, k, v

    def queries(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.queries`."""
        q = torch.empty(hidden.shape[0], self._heads, self.block.head_dim)
        self._before(hidden, cos, sin, q, None, None)
        return q

    def values(self, hidden: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.values`."""
        v = torch.empty(hidden.shape[0], self._kv_heads, self.block.head_dim)
        self._before(hidden, None, None, None, None, v)
        return v

    def _before(
        self,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
    ) -> None:
        """Fill those of q, k and v that are there."""
        for layer, made in ((self.block.q, q), (self.block.k, k), (self.block.v, v)):
            if layer is None and made is not None:
                raise ValueError("this layer takes from an earlier one what it is asked for")
        count = hidden.shape[0]
        _check_input("hidden", hidden, (count, self._hidden))
        for name, table in (("cos", cos), ("sin", sin)):
            if table is not None:
                _check_input(name, table, (count, self.block.rotary_dim))
        places = [None if x is None else x.data_ptr() for x in (cos, sin, q, k, v)]
        _no_memory(
            self._functions.compress_block_before(self._structure, hidden.data_ptr(), *places[:2], count, *places[2:])
        )

    def after(self, attention: Tensor, hidden: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.after`; `hidden` is changed in place and returned."""
        count = hidden.shape[0]
        _check_input("attention", attention, (count, self._heads * self.block.head_dim))
        _check_input("hidden", hidden, (count, self._hidden))
        _no_memory(
            self._functions.compress_block_after(self._structure, attention.data_ptr(), hidden.data_ptr(), count)
        )
        return hidden


class NativeHead:
    """A final RMSNorm and the linear layer behind it, ready for the C++ functions of one build."""

    def __init__(self, layer: Linear, norm: Tensor, epsilon: float, build: Library, threads: int = 1):
        _check_input("norm", norm, (layer.weight.shape[1],))
        layer = _own(layer)
        self.layer, self.norm, self.epsilon, self._threads = layer, norm.detach(), epsilon, threads
        self._functions, self.path = declared(build), dispatch.native_path(build)
        self._structure = describe(layer.weight, layer.bias)

    def __call__(self, hidden: Tensor, activations: Activations = "float") -> Tensor:
        """hidden [M, K] float32 to [M, N]."""
        rows, columns = self.layer.weight.shape
        _check_input("hidden", hidden, (hidden.shape[0], columns))
        y = torch.empty(hidden.shape[0], rows)
        tensors = (self.norm.data_ptr(), self.epsilon, hidden.data_ptr(), hidden.shape[0])
        choices = (ACTIVATIONS[activations], self._threads, y.data_ptr())
        _no_memory(self._functions.compress_norm_linear(self._structure, *tensors, *choices))
        return y


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, build: Library) -> Tensor:
    """See :func:`compress.kernels.block.reference.decode_attention`; float32, k and v in any strides over whole heads.

    Raises:
        ValueError: another dtype, or shapes that don't fit.
        MemoryError: no memory for the scores.
    """
    out = torch.empty_like(q)
    _no_memory(declared(build).compress_decode_attention(_call(q, k, v, mask, scaling, out)))
    return out


def attention_row(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, build: Library
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.block.reference.attention_row`, and `decode_attention`."""
    out, weights = torch.empty_like(q), torch.empty(len(q), q.shape[1], k.shape[2])
    _no_memory(declared(build).compress_attention_row(_call(q, k, v, mask, scaling, out), weights.data_ptr()))
    return out, weights


def attention_mix(weights: Tensor, v: Tensor, head_map: Tensor | None, build: Library) -> Tensor:
    """See :func:`compress.kernels.block.reference.attention_mix`; v in any strides over whole heads.

    Raises:
        ValueError: another dtype, or shapes that don't fit.
    """
    batch, kv_heads, tokens, size = v.shape
    rows = weights.shape[1]
    heads = rows if head_map is None else len(head_map)
    _check_input("weights", weights, (batch, rows, tokens))
    if v.dtype != torch.float32 or not v.is_cpu or heads % kv_heads or (size > 1 and v.stride(3) != 1):
        raise ValueError(f"v {v.dtype} {list(v.shape)} doesn't fit probabilities of {heads} heads")
    where = None
    if head_map is not None:
        if heads != rows or head_map.dtype != torch.int64 or not head_map.is_cpu or not head_map.is_contiguous():
            raise ValueError(f"head_map must be int64 of {rows} heads on the CPU, got {head_map}")
        where = head_map.data_ptr()
    out = torch.empty(batch, heads, size)
    call = CompressAttention(
        *(None, None, v.data_ptr(), None, out.data_ptr()),
        *(0, 0),
        *(0, 0, 0, *v.stride()[:3]),
        *(batch, heads, kv_heads, tokens, size, 1.0),
    )
    _no_memory(declared(build).compress_attention_mix(call, weights.data_ptr(), where))
    return out


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, out: Tensor) -> CompressAttention:
    batch, kv_heads, tokens, size = k.shape
    heads = q.shape[1]
    _check_input("q", q, (batch, heads, size))
    if v.shape != k.shape or k.dtype != torch.float32 or v.dtype != torch.float32 or heads % kv_heads:
        raise ValueError(f"k {k.dtype} {list(k.shape)} and v {v.dtype} {list(v.shape)} don't fit q {list(q.shape)}")
    if not (k.is_cpu and v.is_cpu and (mask is None or mask.is_cpu)):
        raise ValueError(f"k, v and the mask must be on the CPU, got {k.device} and {v.device}")
    if size > 1 and (k.stride(3) != 1 or v.stride(3) != 1):
        raise ValueError("the last dimension of k and v must be contiguous")
    kind = 0 if mask is None else {torch.bool: 1, torch.float32: 2}.get(mask.dtype)
    if kind is None or (mask is not None and (mask.shape != (batch, tokens) or (tokens > 1 and mask.stride(1) != 1))):
        raise ValueError(f"the mask must be bool or float32 of shape {[batch, tokens]}, contiguous over tokens")
    where = None if mask is None else mask.data_ptr()
    return CompressAttention(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), where, out.data_ptr()),
        *(kind, 0 if mask is None else mask.stride(0)),
        *(*k.stride()[:3], *v.stride()[:3]),
        *(batch, heads, kv_heads, tokens, size, scaling),
    )


@cache
def declared(build: Library) -> ctypes.CDLL:
    """The library's functions with the types of the arguments that they take."""
    functions = build.functions
    block, layer, attention = (ctypes.POINTER(kind) for kind in (CompressBlock, CompressLinear, CompressAttention))
    functions.compress_block_before.argtypes = (block, *(_POINTER,) * 3, _SIZE, *(_POINTER,) * 3)
    functions.compress_block_after.argtypes = (block, _POINTER, _POINTER, _SIZE)
    functions.compress_norm_linear.argtypes = (layer, _POINTER, ctypes.c_double, _POINTER, *(_SIZE,) * 3, _POINTER)
    functions.compress_decode_attention.argtypes = (attention,)
    functions.compress_attention_row.argtypes = (attention, _POINTER)
    functions.compress_attention_mix.argtypes = (attention, _POINTER, _POINTER)
    for name in ("block_before", "block_after", "norm_linear", "decode_attention", "attention_row", "attention_mix"):
        getattr(functions, f"compress_{name}").restype = _SIZE
    return functions


def _own_block(block: Block) -> Block:
    """The block over tensor objects of its own; see `_own`."""
    own: dict[str, Any] = {name: None if (part := getattr(block, name)) is None else _own(part) for name in _LAYERS}
    own |= {name: None if (norm := getattr(block, name)) is None else norm.detach() for name in _NORMS}
    return replace(block, **own)


def _described(layer: Linear | None) -> CompressLinear:
    """Zeros for a layer that isn't there."""
    return CompressLinear() if layer is None else describe(layer.weight, layer.bias)


def _own(layer: Linear) -> Linear:
    """The layer over tensor objects of its own: ``.data =`` of the caller's would free what the structure points to."""
    weight = layer.weight
    if isinstance(weight, Tensor):
        weight = weight.detach()
    else:
        zero = None if weight.zero is None else weight.zero.detach()
        weight = replace(weight, codes=weight.codes.detach(), scale=weight.scale.detach(), zero=zero)
    return Linear(weight, None if layer.bias is None else layer.bias.detach())


def _check(block: Block, hidden: int, heads: int, kv_heads: int) -> None:
    attention, inner = heads * block.head_dim, block.gate.weight.shape[0]
    shapes = {
        "q": (attention, hidden),
        "k": (kv_heads * block.head_dim, hidden),
        "v": (kv_heads * block.head_dim, hidden),
        "o": (hidden, attention),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    for name, shape in shapes.items():
        if (part := getattr(block, name)) is None:
            continue
        found = tuple(part.weight.shape)
        if found != shape:
            raise ValueError(f"{name} of a block has shape {list(found)}, expected {list(shape)}")
    if block.rotary_dim % 2 or not 0 <= block.rotary_dim <= block.head_dim:
        raise ValueError(f"rotary_dim={block.rotary_dim} must be even and at most head_dim={block.head_dim}")
    norms = {"attention_norm": hidden, "mlp_norm": hidden, "q_norm": block.head_dim, "k_norm": block.head_dim}
    for name, size in norms.items():
        norm = getattr(block, name)
        if norm is not None:
            _check_input(name, norm, (size,))


def _check_input(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be contiguous float32 of shape {list(shape)} on the CPU, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


def _no_memory(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a layer's scratch")
