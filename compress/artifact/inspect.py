"""What an artifact is, from its files alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact.compressed_tensors import schemes_of
from compress.artifact.export import read_report, weight_files
from compress.artifact.gptq import gptq_scheme
from compress.artifact.shards import tensor_header
from compress.calibrate.disk import sha256
from compress.calibrate.errors import InputError
from compress.plan import read_plan
from compress.share.config import MARK, shares_of, unmarked


@dataclass(frozen=True)
class Inspection:
    """An artifact's facts.

    Attributes:
        folder: where it is.
        report: its report, None for a model that we didn't write.
        config: its ``config.json``.
        weight_bytes: size of the files that hold its weights.
        tensors: number of tensors by dtype.
        damaged: files whose content isn't what the report says.
        shared: which layers take what from which, a sentence each.
    """

    folder: Path
    report: dict[str, Any] | None
    config: dict[str, Any]
    weight_bytes: int
    tensors: dict[str, int]
    damaged: list[str]
    shared: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "folder": str(self.folder),
            "model_type": unmarked(self.config).get("model_type"),
            "shared": self.shared,
            "quantization": self.config.get("quantization_config"),
            "weight_bytes": self.weight_bytes,
            "tensors": self.tensors,
            "damaged": self.damaged,
            "report": self.report,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"{self.folder}: {unmarked(self.config).get('model_type')}, weights {self.weight_bytes / 1e6:.1f} MB"]
        block = self.config.get("quantization_config") or {}
        lines += [f"  {scheme} on {', '.join(targets)}" for targets, scheme in schemes_of(block)]
        if block.get("quant_method") == "gptq":
            lines.append(f"  {gptq_scheme(block)} on the linear layers of the decoder")
        lines += [f"  attention: {line}" for line in self.shared]
        lines.append("  tensors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.tensors.items())))
        if self.report is None:
            return [*lines, "  no report.json: not written by compress"]
        artifact, recipe = self.report["artifact"], self.report["recipe"]
        for name, facts in artifact.get("formats", {}).items():
            lines.append(f"  {name}: {facts['weight_bytes'] / 1e6:.1f} MB in {self.folder / facts['path']}")
        lines.append(f"  {artifact['bits_per_weight']:.2f} bits a weight over the whole file; recipe {recipe['name']}")
        if kv := self.report.get("kv"):
            lines.append(f"  KV cache: {kv['summary']}")
        modules = self.report.get("weights", {}).get("modules", [])
        known = sorted((m for m in modules if m["relative_error"] is not None), key=lambda m: -m["relative_error"])
        lines += [f"  worst: {m['name']} W{m['bits']} rel.err {m['relative_error']:.4f}" for m in known[:5]]
        for row in (self.report.get("eval") or {}).get("rows", []):
            before, after = ("none" if row[side] is None else f"{row[side]:.5g}" for side in ("before", "after"))
            lines.append(f"  {row['task']} {row['metric']}: {before} -> {after}")
        lines += [f"  DAMAGED: {name} isn't the file that was written" for name in self.damaged]
        return lines


def inspect(folder: Path) -> Inspection:
    """Look at an artifact.

    Raises:
        InputError: the folder doesn't exist, holds no model, or a file is unreadable.
    """
    if not (folder / "config.json").is_file():
        raise InputError("DIR", folder, "is not the folder of a model: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        headers = [tensor_header(path)[0] for path in sorted(folder.glob("*.safetensors"))]
    except (ValueError, KeyError) as error:
        raise InputError("DIR", folder, f"holds a file that can't be read ({error})") from error
    counts: dict[str, int] = {}
    for header in headers:
        for entry in header.values():
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + 1
    report = read_report(folder)
    files = report["artifact"]["files"] if report else {}
    damaged = [name for name, facts in files.items() if not intact(folder / name, facts)]
    nbytes = sum(path.stat().st_size for path in weight_files(folder))
    return Inspection(folder, report, config, nbytes, counts, damaged, _shared(folder) if MARK in config else [])


def _shared(folder: Path) -> list[str]:
    found: dict[tuple[int, str], list[int]] = {}
    for layer, share in shares_of(read_plan(folder)).items():
        found.setdefault((share.source, share.mode), []).append(layer)
    taken = {"attn": "probabilities", "kv": "keys and values"}
    return [
        f"layers {', '.join(map(str, layers))} take {taken[mode]} of layer {source}"
        for (source, mode), layers in sorted(found.items())
    ]


def changed_files(folder: Path) -> list[str]:
    """Files of an artifact, or of one of its other formats, that aren't those that its report names."""
    for home, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if report := read_report(home):
            files = {name: facts for name, facts in report["artifact"]["files"].items() if name.startswith(prefix)}
            own = [name for name in files if "/" not in name.removeprefix(prefix)]
            return [name for name in own if not intact(home / name, files[name])]
    return []


def intact(path: Path, facts: dict[str, Any]) -> bool:
    """Whether a file is the one that a report's ``artifact.files`` describes."""
    return path.is_file() and path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]
