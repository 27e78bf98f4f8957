"""The formats whose packed weights are run as they are: compressed-tensors ``pack-quantized`` and GPTQ.

What their tensors mean stands in ``compress/artifact/compressed_tensors.py`` and ``gptq.py``, which write them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from compress.artifact.compressed_tensors import FORMAT, scheme_of, schemes_of
from compress.artifact.gptq import gptq_scheme
from compress.kernels.packing import BIT_WIDTHS, packed_words
from compress.kernels.quant_linear import QuantWeight, from_compressed_tensors, from_gptq
from compress.kernels.quant_linear.weight import Layout
from compress.runtime.stored import StoredTensors
from compress.scheme import Scheme

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


class PackedFormat(ABC):
    """How the linear layers of a folder are packed.

    Attributes:
        mark: the tensor that a packed layer has, behind its name.
    """

    mark: str

    def __init__(self, tensors: StoredTensors) -> None:
        self.tensors = tensors

    def holds(self, name: str) -> bool:
        """Whether a linear layer is packed."""
        return name + self.mark in self.tensors.entries

    def nbytes(self, name: str) -> int:
        """Size of a layer's codes."""
        return self.tensors.entries[name + self.mark].nbytes

    @abstractmethod
    def check(self, name: str, shape: tuple[int, int]) -> set[str]:
        """Compare the headers of a layer's tensors with its shape (N, K); returns their names.

        Raises:
            InputError: one is missing, or has another shape or type.
        """

    @abstractmethod
    def read(self, name: str, shape: tuple[int, int], layout: Layout) -> QuantWeight:
        """Read and repack a layer that was checked.

        Raises:
            InputError: its content can't be what it should be.
        """


class CompressedTensors(PackedFormat):
    """``weight_packed``, ``weight_scale``, ``weight_zero_point`` and ``weight_shape`` of a layer.

    Args:
        tensors: of the folder.
        block: ``quantization_config``.
    """

    mark = ".weight_packed"

    def __init__(self, tensors: StoredTensors, block: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self._schemes = schemes_of(block)

    def check(self, name: str, shape: tuple[int, int]) -> set[str]:
        """See :class:`PackedFormat`."""
        scheme = self._scheme(name)
        groups = _groups(self.tensors, name, scheme, shape)
        self.tensors.check(name + self.mark, (shape[0], packed_words(shape[1], scheme.bits)), (torch.int32,))
        self.tensors.check(f"{name}.weight_scale", (shape[0], groups), _SCALES)
        self.tensors.check(f"{name}.weight_shape", (2,), _INTEGERS)
        found = {name + self.mark, f"{name}.weight_scale", f"{name}.weight_shape"}
        if not scheme.symmetric:
            zero = f"{name}.weight_zero_point"
            self.tensors.check(zero, (packed_words(shape[0], scheme.bits), groups), (torch.int32,))
            found.add(zero)
        return found

    def read(self, name: str, shape: tuple[int, int], layout: Layout) -> QuantWeight:
        """See :class:`PackedFormat`."""
        scheme = self._scheme(name)
        if tuple(self.tensors.read(f"{name}.weight_shape").tolist()) != shape:
            raise self.tensors.problem(f"its tensor {name}.weight_shape isn't {list(shape)}")
        scale = self.tensors.read(f"{name}.weight_scale")
        zero = None if scheme.symmetric else self.tensors.read(f"{name}.weight_zero_point")
        words = self.tensors.read(name + self.mark)
        return from_compressed_tensors(words, scale, zero, shape, scheme.bits, scheme.group_size, layout)

    def _scheme(self, name: str) -> Scheme:
        scheme = scheme_of(name, self._schemes)
        if scheme is None:
            raise self.tensors.problem(f"{name} is packed, and no group of quantization_config says how")
        return scheme


class Gptq(PackedFormat):
    """``qweight``, ``qzeros``, ``scales`` and, unless left out, ``g_idx`` of a layer whose inputs are in order.

    Args:
        tensors: of the folder.
        block: ``quantization_config``.
    """

    mark = ".qweight"

    def __init__(self, tensors: StoredTensors, block: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self._scheme = gptq_scheme(block)
        self._version = 2 if block.get("checkpoint_format") == "gptq_v2" else 1

    def check(self, name: str, shape: tuple[int, int]) -> set[str]:
        """See :class:`PackedFormat`."""
        bits, groups = self._scheme.bits, _groups(self.tensors, name, self._scheme, shape)
        self.tensors.check(name + self.mark, (packed_words(shape[1], bits), shape[0]), (torch.int32,))
        self.tensors.check(f"{name}.scales", (groups, shape[0]), _SCALES)
        self.tensors.check(f"{name}.qzeros", (groups, packed_words(shape[0], bits)), (torch.int32,))
        found = {name + self.mark, f"{name}.scales", f"{name}.qzeros"}
        order = f"{name}.g_idx"
        if order in self.tensors.entries:  # some tools leave it out where it says nothing new
            self.tensors.check(order, (shape[1],), (torch.int32,))
            found.add(order)
        return found

    def read(self, name: str, shape: tuple[int, int], layout: Layout) -> QuantWeight:
        """See :class:`PackedFormat`."""
        words, scale, zeros = (self.tensors.read(name + part) for part in (self.mark, ".scales", ".qzeros"))
        order = f"{name}.g_idx"
        plain = torch.arange(shape[1], dtype=torch.int32) // (shape[1] // scale.shape[0])
        if order in self.tensors.entries and not torch.equal(self.tensors.read(order), plain):
            raise self.tensors.problem(f"its tensor {order} isn't in order, though desc_act is false")
        return from_gptq(words, scale, zeros, self._scheme.bits, layout, self._version)


def packed_format(block: Mapping[str, Any]) -> type[CompressedTensors | Gptq] | None:
    """The format of a folder with this ``quantization_config``, or None if it is run dense."""
    if block.get("quant_method") == "gptq":
        plain = not block.get("desc_act") and not block.get("dynamic") and block.get("bits") in BIT_WIDTHS
        known = block.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
        return Gptq if plain and known else None
    if block.get("quant_method") != "compressed-tensors" or block.get("kv_cache_scheme") is not None:
        return None
    if block.get("transform_config") or block.get("sparsity_config"):  # rotations on the fly, or weights left out
        return None
    form = block.get("format")
    if any(not _weights_only(group, form) for group in block.get("config_groups", {}).values()):
        return None
    return CompressedTensors


def _weights_only(group: Mapping[str, Any], form: str | None) -> bool:
    """Whether a group of compressed-tensors packs integers, and leaves activations alone."""
    weights = group.get("weights") or {}
    return (
        (group.get("format") or form) == FORMAT
        and group.get("input_activations") is None
        and group.get("output_activations") is None
        and weights.get("type") == "int"
        and weights.get("num_bits") in BIT_WIDTHS
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") in (None, "static", "weight")
    )


def _groups(tensors: StoredTensors, name: str, scheme: Scheme, shape: tuple[int, int]) -> int:
    if scheme.group_size == -1:
        return 1
    if scheme.group_size < 1 or shape[1] % scheme.group_size:
        raise tensors.problem(f"groups of {scheme.group_size} don't divide the {shape[1]} inputs of {name}")
    return shape[1] // scheme.group_size
