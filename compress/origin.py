"""Where a model comes from, and its licence: what its README, its GGUF metadata or its place in the cache say."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from compress.gguf_header import read_strings
from compress.gguf_reader import GgufCheckpoint
from compress.model import ModelView
from compress.source import locate, repository

_HUB_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(?:tree|blob)/.*)?/?"
)
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PARENT = re.compile(r"general\.base_model\.\d+\.repo_url")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LEGAL = re.compile(r"(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:[.-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """A model's origin, as far as it is known.

    Attributes:
        hub_id: its own repository on the Hub.
        parents: the repositories that it was made from in turn, as its GGUF file names them.
        license: an identifier of the Hub's, ``other``, a list of them, or None.
        license_name: the name of a licence that is ``other``.
        license_link: where that one can be read.
        languages: ISO 639 codes.
    """

    hub_id: str | None = None
    parents: tuple[str, ...] = ()
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON types, for the report's section ``model``."""
        return {
            "hub_id": self.hub_id,
            "parents": list(self.parents),
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "languages": list(self.languages),
        }


def origin_of(view: ModelView) -> Origin:
    """Read a model's origin; what isn't stated stays unknown and is never guessed from names."""
    if isinstance(view.checkpoint, GgufCheckpoint):
        return _of_gguf(view.checkpoint.header.metadata, view.path)
    hub_id = repository(view.source) if locate(view.source).kind == "hub" else _in_cache(view.path)
    card = _card(view.path / "README.md")
    return _licensed(hub_id, (), card, card.get("language"))


def legal_files(view: ModelView) -> list[Path]:
    """The licence and notices in a model's folder, which a copy has to carry along."""
    if view.path.is_file():
        return []
    return sorted(path for path in view.path.iterdir() if _LEGAL.fullmatch(path.name) and path.is_file())


def _of_gguf(metadata: dict[str, Any], path: Path) -> Origin:
    own = [metadata.get(f"general.{key}") for key in ("source.huggingface.repository", "source.repo_url", "repo_url")]
    parents = [value for key, value in metadata.items() if _PARENT.fullmatch(key)]
    hub_id = next((found for text in own if (found := _repository(text))), None) or _in_cache(path)
    fields = {
        "license": metadata.get("general.license"),
        "license_name": metadata.get("general.license.name"),
        "license_link": metadata.get("general.license.link"),
    }
    languages = read_strings(path, "general.languages").get("general.languages")
    return _licensed(hub_id, tuple(found for text in parents if (found := _repository(text))), fields, languages)


def _licensed(hub_id: str | None, parents: tuple[str, ...], fields: dict[str, Any], languages: Any) -> Origin:
    given = fields.get("license")
    name, link = (
        value if isinstance(value := fields.get(key), str) else None for key in ("license_name", "license_link")
    )
    license_: str | list[str] | None = None
    if isinstance(given, list):
        license_ = [entry for entry in given if isinstance(entry, str) and _SLUG.fullmatch(entry)] or None
    elif isinstance(given, str) and given.strip():
        slug = given.strip().lower()
        license_ = slug if _SLUG.fullmatch(slug) else "other"
        name = name or (None if license_ == slug else given.strip())
    if link is not None and not link.startswith(("http://", "https://")):
        link = f"https://huggingface.co/{hub_id}/blob/main/{link.lstrip('./')}" if hub_id else None
    codes = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    known = tuple(code for code in codes if isinstance(code, str) and _LANGUAGE.fullmatch(code))
    return Origin(hub_id, parents, license_, name, link, known)


def _card(readme: Path) -> dict[str, Any]:
    """The metadata of a README; empty if there is none."""
    if not readme.is_file():
        return {}
    try:
        return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (YAMLError, ValueError, TypeError):  # a README is the author's, and need not be well-formed
        return {}


def _repository(text: Any) -> str | None:
    if not isinstance(text, str):
        return None
    if found := _HUB_URL.fullmatch(text.strip()):
        return found[1]
    return text.strip() if _HUB_ID.fullmatch(text.strip()) else None


def _in_cache(path: Path) -> str | None:
    """The repository of a file or folder in the Hub's cache, ``models--ORG--NAME/snapshots/COMMIT/...``."""
    parts = path.absolute().parts
    for folder, below in pairwise(parts):
        if below == "snapshots" and (found := _CACHED.fullmatch(folder)):
            return f"{found[1]}/{found[2]}"
    return None
