"""The sections on trust: the check after writing, and how the run can be made again."""

from collections.abc import Mapping
from typing import Any

from compress.evalsuite.report.blocks import Block, Facts, Note, Section, Source, Table
from compress.evalsuite.report.wording import dig, nbytes, percent, plural, seconds, three_digits

HASHES = frozenset({"Calibration digest"})
"""Facts that are hashes."""


def check(report: Mapping[str, Any]) -> Section | None:
    """What was found when the artifact was loaded again; None if it wasn't."""
    found = report.get("reload_check")
    if not found:
        return None
    formats = found.get("formats") or {}
    entries: dict[str, str] = {}
    for name, checked in (formats if len(formats) > 1 else {"": found}).items():
        entries |= _checked(checked, f" ({name})" if name else "")
    return Section(
        "check",
        "Is the file what was computed?",
        "Check",
        "The finished files were loaded as a user would load them and compared with the model in memory;"
        " differences should be rounding only.",
        (Facts(entries),),
    )


def _checked(found: Mapping[str, Any], which: str) -> dict[str, str]:
    """What was found for one format, whose name stands behind every entry where there are several."""
    entries = {}
    if "weights_identical" in found:
        entries[f"Every weight as computed{which}"] = "yes, bit for bit" if found["weights_identical"] else "no"
    if found.get("relative_difference") is not None:
        allowed = f" (allowed: {three_digits(found['tolerance'])})" if found.get("tolerance") else ""
        difference = f"{three_digits(found['relative_difference'])} of the largest{allowed}"
        entries[f"Largest difference of outputs{which}"] = difference
    if found.get("top1_agreement") is not None:
        entries[f"Same next token{which}"] = percent(found["top1_agreement"])
    return entries


def origin(report: Mapping[str, Any]) -> Section | None:
    """How the run was made: model, recipe, calibration, versions, seeds, hashes, command."""
    entries = facts_of(report)
    blocks: list[Block] = [Facts(entries, HASHES)] if entries else []
    if report.get("command"):
        blocks.append(Source(str(report["command"])))
    blocks += [Note(str(note)) for note in dig(report, "calibration", "notes") or []]
    if recipe := report.get("recipe"):
        blocks.append(Source(_recipe_text(recipe), "The recipe with every key"))
    if hashes := dig(report, "fingerprint", "model"):
        rows = tuple((str(name), str(value)) for name, value in hashes.items())
        blocks.append(Table("Files of the original", ("File", "sha256"), rows, folded=True))
    if files := dig(report, "artifact", "files"):
        listed = tuple(
            (name, nbytes(dig(file, "bytes")), str(dig(file, "sha256") or "")) for name, file in files.items()
        )
        blocks.append(Table("Files of the artifact", ("File", "Size", "sha256"), listed, frozenset({1}), folded=True))
    if not blocks:
        return None
    return Section(
        "origin",
        "How this was made",
        "Origin",
        "Everything it takes to repeat the run: with the same files, versions and seeds the same command makes"
        " the same model.",
        tuple(blocks),
    )


def facts_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Names and values: the model, the recipe, the calibration text, the machine."""
    return _model(report) | _calibration(report) | _machine(report)


def _model(report: Mapping[str, Any]) -> dict[str, str]:
    model = report.get("model") or {}
    entries = {
        "Model": model.get("name"),
        "Taken from": model.get("source") if model.get("source") != model.get("name") else None,
        "Licence": model.get("license"),
        "Architecture": model.get("family"),
        "Size": f"{plural(model['parameters'], 'parameter')} in {plural(model['layers'], 'layer')}"
        if model.get("parameters") and model.get("layers")
        else None,
        "Recipe": dig(report, "recipe", "name"),
        "The recipe's own words": dig(report, "recipe", "description"),
        "Weights": _weights(report),
        "Rotation": _rotation(report),
    }
    return {key: str(value) for key, value in entries.items() if value}


def _weights(report: Mapping[str, Any]) -> str | None:
    """What this run asked for, which need not be what the recipe's description says."""
    asked = dig(report, "recipe", "weights") or {}
    size = dig(report, "weights", "group_size") or asked.get("group_size")
    parts = [f"{asked['bits']} bits" if asked.get("bits") else "", f"group size {size}" if size else ""]
    if "symmetric" in asked:
        parts.append("symmetric" if asked["symmetric"] else "asymmetric")
    if others := asked.get("overrides"):
        parts.append(f"except {'; '.join(f'{pattern}: {bits}' for pattern, bits in others.items())}")
    return ", ".join(part for part in parts if part) or None


def _rotation(report: Mapping[str, Any]) -> str | None:
    found = dig(report, "weights", "rotation")
    if not found or {found.get("residual"), found.get("heads")} <= {"none", None}:
        return None
    return f"residual stream {found.get('residual')}, value heads {found.get('heads')}, fused into the weights"


def _calibration(report: Mapping[str, Any]) -> dict[str, str]:
    found = report.get("calibration")
    if not found:
        return {}
    entries = {"Calibration text": found.get("origin") or found.get("source")}
    if found.get("samples") and found.get("seq_len"):
        windows = f"{plural(found['samples'], 'window')} of {found['seq_len']:,} tokens"
        entries["Calibration size"] = f"{windows}, {found['samples'] * found['seq_len']:,} in all"
    entries["Calibration digest"] = found.get("digest")
    return {key: str(value) for key, value in entries.items() if value}


def _machine(report: Mapping[str, Any]) -> dict[str, str]:
    entries = {}
    if report.get("seed") is not None:
        entries["Seed"] = str(report["seed"])
    if report.get("device"):
        entries["Device"] = str(report["device"])
    if report.get("seconds"):
        entries["Time, all steps"] = seconds(report["seconds"])
    if versions := report.get("versions"):
        entries["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return entries


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """The resolved recipe, one key a line."""
    lines = []
    for name, section in recipe.items():
        if isinstance(section, Mapping):
            lines.append(f"{name}:")
            lines += [f"  {key}: {_value(value)}" for key, value in section.items()]
        else:
            lines.append(f"{name}: {_value(section)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
