"""What the user calls a model: a Hub id, a local folder, or a ``.gguf`` file.

A Hub id may name a folder in the repository, ``ORG/NAME/FOLDER``: an artifact's second format lies in one.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its httpx
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from compress.calibrate.errors import InputError, did_you_mean

GGUF_FILE = "model.gguf"
"""The weights of an artifact in GGUF; of other GGUF files on the Hub a repository holds many, and none is fetched."""

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96}){0,2}")
_WANTED = [
    "*.safetensors",
    "*.json",
    "recipe.yaml",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
]
_UNWANTED = ["consolidated*", "adapter_*"]
_OFFLINE_FIX = "check the connection, or give a local folder or a .gguf file"
_HUB_ERRORS = (HTTPError, EntryNotFoundError, OfflineModeIsEnabled)
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Source:
    """Where a model is: ``path`` is the folder or file, or None for a model on the Hub."""

    text: str
    kind: Literal["hub", "folder", "gguf"]
    path: Path | None


def locate(text: str) -> Source:
    """Tell a folder, a ``.gguf`` file and a Hub id apart; what exists on this machine comes first.

    Raises:
        InputError: neither an existing path nor a possible Hub id; the nearest existing name is in the text.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return Source(text, "folder", path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                "--model", text, "it is a file, but not a .gguf file", fix=f"give its folder {path.parent}"
            )
        return Source(text, "gguf", path)
    is_path = text.startswith((".", "/", "~")) or text.endswith((".gguf", "/")) or not _HUB_ID.fullmatch(text)
    if is_path or any(place.is_dir() for place in path.parents if place != Path()):
        raise InputError("--model", text, "there is no such file or folder", fix=_nearest(path))
    return Source(text, "hub", None)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} doesn't exist either"
    near = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    return near or "give a Hub id, a local folder or a .gguf file"


def repository(hub_id: str) -> str:
    """The repository of a Hub id, without the folder in it."""
    return "/".join(hub_id.split("/")[:2])


def hub_weight_bytes(hub_id: str) -> int | None:
    """The size of a model's weights on the Hub, safetensors or an artifact's GGUF; None if the Hub can't be reached.

    Asked first of all, because this request fails at once without a network; a download is tried for 24 s.

    Raises:
        InputError: the repository is unknown, or holds neither.
    """
    try:
        siblings = HfApi().model_info(repository(hub_id), files_metadata=True, timeout=_TIMEOUT).siblings or []
    except HfHubHTTPError as error:
        raise _hub_error(hub_id, error) from error
    except (HTTPError, OfflineModeIsEnabled):
        return None
    prefix = _prefix(hub_id)
    sizes = {file.rfilename: file.size or 0 for file in siblings}
    own = {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    weights = [size for name, size in own.items() if name.endswith(".safetensors") and "/" not in name]
    if not weights and {GGUF_FILE, "config.json"} <= set(own):
        weights = [own[GGUF_FILE]]
    if not weights:
        fix = "download a .gguf file of it and give its path, or choose a repository with safetensors"
        place = f"the folder {prefix[:-1]} of this repository" if prefix else "this repository"
        raise InputError("--model", hub_id, f"{place} holds no safetensors, and pickles are never read", fix=fix)
    return sum(weights)


def hub_config_folder(hub_id: str, online: bool) -> Path:
    """The cached folder that holds the ``config.json`` of a model on the Hub; only this file is fetched.

    Raises:
        InputError: gated, unreachable or without a config, with the way on.
    """
    try:
        name = f"{_prefix(hub_id)}config.json"
        return Path(hf_hub_download(repository(hub_id), name, local_files_only=not online)).parent
    except _HUB_ERRORS as error:
        raise _hub_error(hub_id, error) from error


def hub_report_folder(hub_id: str, online: bool) -> Path | None:
    """The cached folder that holds the ``report.json`` of an artifact on the Hub, also of one that ``hub_id`` names a
    folder of; only this file is fetched. None if there is none.

    Raises:
        InputError: gated or unreachable, with the way on.
    """
    try:
        return Path(hf_hub_download(repository(hub_id), "report.json", local_files_only=not online)).parent
    except EntryNotFoundError:
        return None
    except _HUB_ERRORS as error:
        raise _hub_error(hub_id, error) from error


def download(hub_id: str, online: bool) -> Path:
    """Fetch a model from the Hub, or find it in the cache: weights, config, tokenizer, README and licence.

    Weights are safetensors, or, where there are none, the file of an artifact in GGUF. Folders stay where they are but
    for the one that the id names; with that one comes the report of the artifact around it.

    Returns:
        The folder.

    Raises:
        InputError: gated or unreachable, with the way on.
    """
    repo, prefix = repository(hub_id), _prefix(hub_id)
    wanted = [prefix + pattern for pattern in _WANTED] + (["report.json"] if prefix else [])
    unwanted = [prefix + pattern for pattern in ("*/*", *_UNWANTED)]
    try:
        found = Path(
            snapshot_download(repo, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=not online)
        )
        folder = found / prefix
        if online and not list(folder.glob("*.safetensors")):
            hf_hub_download(repo, prefix + GGUF_FILE, revision=found.name)
    except _HUB_ERRORS as error:
        raise _hub_error(hub_id, error) from error
    return folder


def _prefix(hub_id: str) -> str:
    """The folder in the repository with a slash behind it; empty for the repository itself."""
    folder = "/".join(hub_id.split("/")[2:])
    return f"{folder}/" if folder else ""


def _hub_error(hub_id: str, error: Exception) -> InputError:
    repo = repository(hub_id)
    details: dict[str, Any]
    if isinstance(error, GatedRepoError):
        details = {
            "problem": "this model is gated and your account has no access to it",
            "fix": f"accept its terms at https://huggingface.co/{repo}, then run `hf auth login`",
        }
    elif isinstance(error, RepositoryNotFoundError):
        details = {
            "problem": "neither a local path nor a model on the Hub, or it is private",
            "fix": _nearest(Path(hub_id)) + "; for a private model run `hf auth login`",
        }
    elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        details = {
            "problem": "it is no local path, it isn't in the Hub's cache, and the Hub can't be reached",
            "fix": _OFFLINE_FIX,
        }
    elif isinstance(error, EntryNotFoundError):
        details = {"problem": "this repository holds no config.json", "fix": "choose one in transformers' format"}
    else:
        details = {"problem": f"the Hub refused: {error}".splitlines()[0], "fix": _OFFLINE_FIX}
    return InputError("--model", hub_id, **details)
