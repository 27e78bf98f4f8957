"""The weights of a model on disk: what is there is known from headers, and one tensor at a time is read.

Only safetensors and GGUF are read. Files are checked against their headers when they are opened, so that a truncated
download is found before any heavy work.
"""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calibrate.disk import sha256
from compress.calibrate.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 4096  # of a matrix compared at once
_DAMAGED = "download it again, or compare its size and checksum with the original"


class Checkpoint(Protocol):
    """Named tensors on disk, with the names and the row order that transformers uses."""

    def names(self) -> list[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The type in which ``read`` returns a tensor."""
        ...

    def storage_dtype(self) -> torch.dtype:
        """The floating type that a copy of this model would be stored in without loss of meaning."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        ...

    def files(self) -> list[Path]:
        """The files that hold the model: weights, their index and the config."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name; computed once for every instance."""
        ...


class FileSet:
    """The files of a checkpoint and their checksums."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._checksums: dict[str, str] = {}

    def files(self) -> list[Path]:
        """The files that hold the model."""
        return list(self._files)

    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name; files are streamed, and read once for every instance."""
        for file in self._files:
            if file.name not in self._checksums:
                self._checksums[file.name] = sha256(file)
        return dict(self._checksums)


class SafetensorsCheckpoint(FileSet):
    """A folder with ``model.safetensors``, or with shards and their index.

    Args:
        folder: the folder.
        source: how the user named the model, for errors.

    Raises:
        InputError: no safetensors (pickles are never read), a missing or damaged shard, an unusable type.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self._source = source
        shards = _shards(folder, source)
        index = [folder / INDEX_NAME] if (folder / INDEX_NAME).is_file() else []
        super().__init__([*shards, *index, folder / "config.json"])
        self._home: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for shard in shards:
            self._read_header(shard)

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    piece = handle.get_slice(name)
                    if piece.get_dtype() not in _DTYPES:
                        problem = f"the tensor {name} has the type {piece.get_dtype()}, so the model is quantized"
                        raise InputError("--model", self._source, problem, allowed=", ".join(_DTYPES))
                    self._home[name] = shard
                    self._shapes[name] = tuple(piece.get_shape())
                    self._dtypes[name] = _DTYPES[piece.get_dtype()]
        except (SafetensorError, OSError) as error:
            problem = f"{shard.name} ({shard.stat().st_size:,} bytes) is truncated or damaged ({error})"
            raise InputError("--model", self._source, problem, fix=_DAMAGED) from error

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return self._dtypes[name]

    def storage_dtype(self) -> torch.dtype:
        """The type that holds most of the weights."""
        weights: Counter[torch.dtype] = Counter()
        for name, dtype in self._dtypes.items():
            weights[dtype] += prod(self._shapes[name])
        return weights.most_common(1)[0][0]

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored type.

        The file is opened for each tensor: a handle kept open would keep every page it has touched in memory.
        """
        with safe_open(self._home[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()

    def differ(self, first: str, second: str) -> bool:
        """Whether two tensors are both there and not equal; they are read a few rows at a time, up to a difference."""
        if not {first, second} <= self._home.keys():
            return False
        if self._shapes[first] != self._shapes[second]:
            return True
        with safe_open(self._home[first], framework="pt") as one, safe_open(self._home[second], framework="pt") as two:
            pieces = one.get_slice(first), two.get_slice(second)
            for start in range(0, self._shapes[first][0], _ROWS):
                rows, others = (piece[start : start + _ROWS] for piece in pieces)
                if not torch.equal(rows.float(), others.float()):
                    return True
        return False


def _shards(folder: Path, source: str) -> list[Path]:
    """The safetensors files of a folder, as its index lists them."""
    if (folder / INDEX_NAME).is_file():
        shards = [folder / name for name in sorted(set(_weight_map(folder, source).values()))]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            problem = f"{len(missing)} of {len(shards)} shards that its index lists are missing, first {missing[0]}"
            raise InputError("--model", source, problem, fix="complete the download")
        return shards
    found = sorted(folder.glob("*.safetensors"))
    if [file.name for file in found] == ["adapter_model.safetensors"]:
        raise InputError("--model", source, "it holds an adapter, not a model", fix="merge it into its base model")
    if (folder / "model.safetensors") in found:
        return [folder / "model.safetensors"]
    if len(found) == 1:
        return found
    if found:
        raise InputError("--model", source, f"it holds {len(found)} safetensors files but no {INDEX_NAME}")
    raise _no_safetensors(folder, source)


def _no_safetensors(folder: Path, source: str) -> InputError:
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        return InputError(
            "--model",
            source,
            f"its weights are pickles ({pickles[0]}), which can run code when they are opened and are never read",
            fix="where you trust the file, convert it: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)",
        )
    if gguf := sorted(folder.glob("*.gguf")):
        return InputError("--model", source, "it holds no safetensors", fix=f"give the GGUF file itself: {gguf[0]}")
    return InputError("--model", source, "it holds no safetensors, so there are no weights to read")


def _weight_map(folder: Path, source: str) -> dict[str, str]:
    index = read_json(folder / INDEX_NAME, source)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError("--model", source, f"{INDEX_NAME} has no weight_map", fix=_DAMAGED)
    if strange := [name for name in weights.values() if not isinstance(name, str) or Path(name).name != name]:
        raise InputError("--model", source, f"{INDEX_NAME} names {strange[0]!r}, which isn't a file of this folder")
    return weights


def read_json(file: Path, source: str) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        InputError: the file isn't there or isn't a JSON object.
    """
    if not file.is_file():
        raise InputError("--model", source, f"it holds no {file.name}", fix="give a folder saved by save_pretrained")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("--model", source, f"{file.name} can't be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("--model", source, f"{file.name} is no valid JSON ({error})", fix=_DAMAGED) from error
    if not isinstance(content, dict):
        raise InputError("--model", source, f"{file.name} holds no JSON object", fix=_DAMAGED)
    return content


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare a checkpoint's headers with the tensors that the config calls for.

    Args:
        checkpoint: the weights on disk.
        expected: shape by name.
        source: how the user named the model, for the error.

    Raises:
        InputError: tensors are missing, or have another shape than the config says.
    """
    present = set(checkpoint.names())
    if missing := [name for name in expected if name not in present]:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        problem = f"{len(missing)} of {len(expected)} tensors are missing from its files: {listed}"
        raise InputError("--model", source, problem, fix=_DAMAGED)
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            problem = f"{name} has the shape {list(checkpoint.shape(name))} where config.json calls for {list(shape)}"
            raise InputError("--model", source, problem, fix="config.json and weights belong to different models")
