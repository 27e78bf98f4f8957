"""Calibration windows kept on disk, so that text a model wrote is written once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import platformdirs
import torch
from compress.calibrate.disk import replacing
from compress.calibrate.selfgen import GENERATOR_VERSION, SelfText
from compress.calibrate.windows import CalibrationSet, calibration_set
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase


def default_cache_dir() -> Path:
    """Where windows are kept unless told otherwise: the user's cache folder of this system."""
    return Path(platformdirs.user_cache_dir("compress"), "calibration")


def cache_key(
    model_fingerprint: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, settings: SelfText
) -> str:
    """What self-generated windows depend on, as a sha256: model, tokenizer, shape, settings, version of the generator.

    Args:
        model_fingerprint: names the weights, e.g. the sha256 of the model's files.
        tokenizer: its vocabulary and chat template count.
        samples: how many windows.
        seq_len: tokens of a window.
        settings: sampling and seed.
    """
    parts = {
        "generator": GENERATOR_VERSION,
        "model": model_fingerprint,
        "vocabulary": tokenizer.get_vocab(),
        "chat_template": tokenizer.chat_template,
        "special": tokenizer.all_special_ids,
        "shape": [samples, seq_len],
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(key: str, make: Callable[[], CalibrationSet], cache_dir: Path | None = None) -> CalibrationSet:
    """The windows kept under a key; made and kept when there are none, or when the file is damaged.

    Args:
        key: from :func:`cache_key`.
        make: writes the windows.
        cache_dir: the folder; :func:`default_cache_dir` by default. One that can't be written to costs a note, not the
            run.

    Returns:
        The windows; their notes say whether they came from the cache.
    """
    path = (cache_dir or default_cache_dir()) / f"{key}.safetensors"
    kept = _load(path, key)
    if kept is not None:
        return kept
    damaged = (f"the cached windows in {path} were damaged and have been made again",) if path.exists() else ()
    made = make()
    try:
        _store(path, key, made)
        stored = f"kept for the next run in {path}"
    except OSError as error:
        stored = f"not kept for the next run: {path.parent} can't be written to ({error.strerror or error})"
    return calibration_set(
        made.ids, made.source, made.origin, available=made.available, notes=(*made.notes, *damaged, stored)
    )


def _load(path: Path, key: str) -> CalibrationSet | None:
    """The windows in a file, or None when it is absent, cut off, altered, or of another key."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            ids = file.get_tensor("ids") if "ids" in file.keys() else torch.empty(0, 0)  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError):
        return None
    if about.get("key") != key:
        return None
    notes = (*about["notes"], f"read from {path}")
    found = calibration_set(ids, about["source"], about["origin"], available=about["available"], notes=notes)
    return found if found.digest == about["digest"] else None


def _store(path: Path, key: str, made: CalibrationSet) -> None:
    about = {
        "key": key,
        "digest": made.digest,
        "source": made.source,
        "origin": made.origin,
        "available": made.available,
        "notes": made.notes,
    }
    with replacing(path) as part:
        save_file({"ids": made.ids.to(torch.int32)}, part, metadata={"about": json.dumps(about)})
