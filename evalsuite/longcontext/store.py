"""Prompts kept on disk, so that those of a tokenizer, a task and a length are made once."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import platformdirs
from compress.calibrate.disk import replacing
from compress.evalsuite.longcontext.prompts import Item, make_items, token_ids
from compress.evalsuite.longcontext.settings import LongContextSettings
from compress.evalsuite.longcontext.vocabulary import NOISE

VERSION = 2
"""Of the generator: prompts of another version are made anew."""

_PROBE = f"{NOISE}\n\nline amber-wolf: <12345>. VAR QXZJK = 6789012. 1b4e28ba-2fa1-41d2-883f-0016d3cca427 ñ"


def default_cache_dir() -> Path:
    """Where prompts are kept unless told otherwise: the user's cache folder of this system."""
    return Path(platformdirs.user_cache_dir("compress"), "long-context")


def prepare(
    tasks: Sequence[str],
    tokenizer: Any,
    settings: LongContextSettings,
    haystack: str | None = None,
    cache_dir: Path | None = None,
) -> list[Item]:
    """The questions of all tasks, from the cache or made and kept there; needs the tokenizer, but no model.

    They are kept by tokenizer, task, length, depths, samples, seed and haystack. A folder that can't be written to, or
    a damaged file, costs time, nothing else.

    Args:
        tasks: names out of ``TASKS``.
        tokenizer: sizes the prompts.
        settings: the grid.
        haystack: text around the needles; None, or a text without words, is RULER's repeated sentences.
        cache_dir: the folder; :func:`default_cache_dir` by default.

    Raises:
        InputError: a length is too short for a task.
    """
    folder, words = cache_dir or default_cache_dir(), (haystack or "").split()
    shared = {
        "version": VERSION,
        "tokenizer": _fingerprint(tokenizer),
        "haystack": _digest((haystack or "").encode("utf-8", "surrogatepass")),
    }
    found = []
    for task in tasks:
        for length in settings.lengths:
            one = replace(settings, lengths=(length,))
            path = folder / f"{_digest(_json(shared | {'task': task, 'settings': asdict(one)}))}.json"
            items = _load(path)
            if items is None:
                items = make_items(task, tokenizer, one, words)
                _store(path, items)
            found += items
    return found


def _fingerprint(tokenizer: Any) -> str:
    """Differs where a tokenizer's vocabulary does, or what it makes of the kinds of text that prompts hold."""
    return _digest(_json([tokenizer.get_vocab(), token_ids(tokenizer, _PROBE)]))


def _load(path: Path) -> list[Item] | None:
    """The items in a file, or None when it is absent, cut off or altered."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _digest(_json(kept["items"])) != kept["digest"]:
            return None
        return [Item(**item | {"answers": tuple(item["answers"])}) for item in kept["items"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, items: list[Item]) -> None:
    rows = [asdict(item) for item in items]
    with suppress(OSError), replacing(path) as part:
        part.write_bytes(_json({"digest": _digest(_json(rows)), "items": rows}))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
