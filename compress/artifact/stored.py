"""Files of the format ``pack-quantized``, or of plain tensors, read as what they stand for, in float32."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compress.artifact.compressed_tensors import dequantized, scheme_of, schemes_of
from compress.artifact.shards import tensor_header
from compress.calibrate.errors import InputError
from compress.checkpoint import FileSet, check_tensors, read_json
from compress.model import ModelView, view_of
from compress.scheme import Scheme
from compress.share.config import folder_config, folder_shares
from compress.share.view import shared_view

PACKED = ".weight_packed"
_PARTS = (".weight_scale", ".weight_zero_point", ".weight_shape")


class PackedCheckpoint(FileSet):
    """Safetensors files of the format ``pack-quantized`` as a checkpoint of plain weights, dequantized when read.

    Args:
        parts: the files.
        schemes: how every packed module is stored.
        dtype: of everything that isn't packed.
        others: files that belong to the model too.
    """

    def __init__(
        self, parts: Sequence[Path], schemes: Mapping[str, Scheme], dtype: torch.dtype, others: Sequence[Path] = ()
    ) -> None:
        super().__init__([*parts, *others])
        self.parts, self.schemes = list(parts), dict(schemes)
        self._dtype = dtype
        self._home: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for part in parts:
            for name, entry in tensor_header(part)[0].items():
                self._home[name] = part
                self._shapes[name] = tuple(entry["shape"])

    def names(self) -> list[str]:
        """The names of all tensors, as the unquantized model has them."""
        plain = [name for name in self._home if not name.endswith((PACKED, *_PARTS))]
        return plain + [f"{name.removesuffix(PACKED)}.weight" for name in self._home if name.endswith(PACKED)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        module = name.removesuffix(".weight")
        if name in self._shapes:
            return self._shapes[name]
        rows, columns = self._stored(f"{module}.weight_shape").tolist()
        return rows, columns

    def dtype(self, name: str) -> torch.dtype:
        """float32 for every tensor."""
        return torch.float32

    def storage_dtype(self) -> torch.dtype:
        """The type of everything that isn't packed."""
        return self._dtype

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        module = name.removesuffix(".weight")
        if module + PACKED not in self._home:
            return self._stored(name).float()
        names = [module + kind for kind in (PACKED, *_PARTS) if module + kind in self._home]
        return dequantized({key: self._stored(key) for key in names}, module, self.schemes[module].bits)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()


def open_stored(folder: Path, source: str) -> ModelView:
    """The model of a folder with safetensors, plain or ``pack-quantized``, whether its layers share or not.

    Raises:
        InputError: a packed module that its config doesn't describe, a missing tensor, or a plan that is missing.
    """
    content = read_json(folder / "config.json", source)
    config, shares = folder_config(folder, content), folder_shares(folder, content)
    block = content.get("quantization_config")
    described = schemes_of(block) if block else []
    parts, schemes = sorted(folder.glob("*.safetensors")), {}
    for name in (key for part in parts for key in tensor_header(part)[0] if key.endswith(PACKED)):
        module = name.removesuffix(PACKED)
        scheme = scheme_of(module, described)
        if scheme is None:
            raise InputError("--model", source, f"{module} is packed, and no group of quantization_config says how")
        schemes[module] = scheme
    if block:
        del config.quantization_config
    index = list(folder.glob("*.safetensors.index.json"))
    checkpoint = PackedCheckpoint(parts, schemes, config.dtype, [*index, folder / "config.json"])
    view = view_of(config, checkpoint, folder)
    if shares:
        view = shared_view(view, checkpoint, shares)
        check_tensors(checkpoint, view.facts.tensor_shapes(), source)
    nbytes = sum(part.stat().st_size for part in parts)
    facts = replace(view.facts, source=source, name=folder.resolve().name, checkpoint_bytes=nbytes)
    return view.over(facts, checkpoint)
