"""The tensors of a folder's safetensors files: known from their headers, read one at a time."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compress.artifact.shards import tensor_header
from compress.calibrate.errors import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        path: its file.
        start: its first byte in that file.
        shape: its shape.
        dtype: its type.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


class StoredTensors:
    """The tensors of a folder, from the headers of its files.

    Files are read and not mapped: pages of a mapped file count as memory of the process until all of it is closed, and
    the packed model is to be the only copy.

    Raises:
        InputError: a header that is damaged, or a file that is shorter than its header says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._add(path)
            except (ValueError, KeyError, TypeError) as error:
                raise self.problem(f"{path.name} can't be read ({error})") from error

    def problem(self, text: str) -> InputError:
        """The error that names this folder."""
        return InputError("--model", self.folder, text)

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Compare a tensor's header with what it has to be.

        Raises:
            InputError: it is missing, or has another shape or type.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.problem(f"lacks the tensor {name}")
        if entry.shape != shape or entry.dtype not in dtypes:
            allowed = " or ".join(_name(dtype) for dtype in dtypes)
            raise self.problem(
                f"its tensor {name} is {_name(entry.dtype)} {list(entry.shape)}, expected {allowed} {list(shape)}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view = memoryview(data.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise self.problem(f"{entry.path.name} is shorter than its header says")
                view = view[count:]
        return data.view(entry.dtype).view(entry.shape)

    def _add(self, path: Path) -> None:
        header, start = tensor_header(path)
        size = path.stat().st_size
        for name, facts in header.items():
            begin, end = facts["data_offsets"]
            entry = Entry(path, start + begin, tuple(facts["shape"]), _DTYPES[facts["dtype"]])
            if begin < 0 or end - begin != entry.nbytes or start + end > size:
                raise ValueError(f"the data of {name} isn't where its header says")
            if name in self.entries:
                raise ValueError(f"{name} is there twice")
            self.entries[name] = entry


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
