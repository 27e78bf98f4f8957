"""Packed weights as a model to read from: the parts that a stage left, or the files of a finished artifact.

A method that looks at a quantized model layer by layer reads it as it reads any other, and gets the weights that the
codes stand for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from compress.artifact.compressed_tensors import FORMAT, dequantized, scheme_of, schemes_of
from compress.artifact.export import read_report, weight_files
from compress.artifact.shards import tensor_header
from compress.calibrate.errors import InputError
from compress.checkpoint import FileSet, read_json
from compress.job import Result
from compress.model import ModelView, view_of
from compress.recipe import Recipe
from compress.scheme import Scheme

_PACKED = ".weight_packed"
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
        plain = [name for name in self._home if not name.endswith((_PACKED, *_PARTS))]
        return plain + [f"{name.removesuffix(_PACKED)}.weight" for name in self._home if name.endswith(_PACKED)]

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
        if module + _PACKED not in self._home:
            return self._stored(name).float()
        names = [module + kind for kind in (_PACKED, *_PARTS) if module + kind in self._home]
        return dequantized({key: self._stored(key) for key in names}, module, self.schemes[module].bits)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()


def stored_view(view: ModelView, result: Result) -> ModelView:
    """What a stage made of a model, to be read like the model."""
    checkpoint = PackedCheckpoint(result.parts, result.schemes, result.dtype)
    facts = replace(view.facts, tied=view.tied and not result.untied, dtype=result.dtype)
    return ModelView(facts, checkpoint, view.path, trust_remote_code=False)


def is_packed_artifact(model: str) -> bool:
    """Whether a model is the folder of an artifact of ours whose first format is compressed-tensors, and packed."""
    folder = Path(model).expanduser()
    report = read_report(folder) if folder.is_dir() else None
    if report is None or report["artifact"]["format"] != "compressed-tensors":
        return False
    block = read_json(folder / "config.json", model).get("quantization_config") or {}
    return bool(block.get("format") == FORMAT)


def open_packed(model: str, trust_remote_code: bool = False) -> ModelView:
    """An artifact for which :func:`is_packed_artifact` holds, as a model to read from.

    Raises:
        InputError: a packed module that its config doesn't describe.
    """
    folder = Path(model).expanduser()
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    schemes = schemes_of(config.quantization_config)
    parts, found = weight_files(folder), {}
    for name in (key for part in parts for key in tensor_header(part)[0] if key.endswith(_PACKED)):
        module = name.removesuffix(_PACKED)
        scheme = scheme_of(module, schemes)
        if scheme is None:
            raise InputError("--model", model, f"{module} is packed, and no group of quantization_config says how")
        found[module] = scheme
    del config.quantization_config
    index = list(folder.glob("*.safetensors.index.json"))
    checkpoint = PackedCheckpoint(parts, found, config.dtype, [*index, folder / "config.json"])
    view = view_of(config, checkpoint, folder)
    nbytes = sum(part.stat().st_size for part in parts)
    name = folder.resolve().name
    facts = replace(view.facts, source=model, name=name, checkpoint_bytes=nbytes, packed=True)
    return ModelView(facts, checkpoint, folder, trust_remote_code)


def check_carried(model: str, recipe: Recipe) -> None:
    """Whether packed weights can be taken over as the recipe wants them written.

    Raises:
        InputError: another format or type is asked for.
    """
    told = f"the weights of {model} are packed already and are taken over as they are"
    if recipe.export.formats != ("compressed-tensors",):
        formats = ", ".join(recipe.export.formats)
        raise InputError("export.formats", formats, told, allowed="compressed-tensors")
    if recipe.export.dtype != "auto":
        raise InputError("export.dtype", recipe.export.dtype, told, allowed="auto")
