"""Safetensors files joined into shards without reading a tensor: headers are merged, data is copied byte for byte."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALIGNMENT = 8  # of the data section, as the format's reference writer does it


def tensor_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file without its metadata, and where its data begins.

    Raises:
        ValueError: there is no such header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is shorter than its header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path.name} is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def join(parts: Sequence[Path], folder: Path, shard_bytes: int) -> dict[str, int]:
    """Write the tensors of ``parts`` into ``folder`` as transformers names them.

    One file ``model.safetensors``, or several of at most ``shard_bytes`` (a part is never split) with an index.

    Returns:
        Bytes of every file written, by name.
    """
    shards: list[list[Path]] = [[]]
    filled = 0
    for part in parts:
        size = part.stat().st_size
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    places: dict[str, str] = {}
    total = 0
    for name, members in zip(names, shards, strict=True):
        header = _concatenate(members, folder / name)
        places |= dict.fromkeys(header, name)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    written = {name: (folder / name).stat().st_size for name in names}
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")
        written[path.name] = path.stat().st_size
    return written


def _concatenate(parts: Sequence[Path], target: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    starts = []
    offset = 0
    for part in parts:
        header, start = tensor_header(part)
        starts.append(start)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            merged[name] = entry | {"data_offsets": [low + offset, high + offset]}
        offset += part.stat().st_size - start
    content = json.dumps({"__metadata__": {"format": "pt"}, **merged}).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    with target.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, file, 16 << 20)
    return merged
