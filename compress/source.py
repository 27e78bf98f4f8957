"""What the user calls a model: a Hub id, a local folder, or a ``.gguf`` file."""

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

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
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
_UNWANTED = ["*/*", "consolidated*", "adapter_*"]
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
    if is_path or (len(path.parts) > 1 and path.parent.is_dir()):
        raise InputError("--model", text, "there is no such file or folder", fix=_nearest(path))
    return Source(text, "hub", None)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} doesn't exist either"
    near = did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    return near or "give a Hub id, a local folder or a .gguf file"


def hub_weight_bytes(repo: str) -> int | None:
    """The size of the safetensors of a model on the Hub; None when the Hub can't be reached.

    Asked first of all, because this request fails at once without a network; a download is tried for 24 s.

    Raises:
        InputError: the repository is unknown, or holds no safetensors.
    """
    try:
        siblings = HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT).siblings or []
    except HfHubHTTPError as error:
        raise _hub_error(repo, error) from error
    except (HTTPError, OfflineModeIsEnabled):
        return None
    weights = [file for file in siblings if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename]
    if not weights:
        fix = "download a .gguf file of it and give its path, or choose a repository with safetensors"
        raise InputError("--model", repo, "this repository holds no safetensors, and pickles are never read", fix=fix)
    return sum(file.size or 0 for file in weights)


def hub_config_folder(repo: str, online: bool) -> Path:
    """The cached folder that holds the ``config.json`` of a model on the Hub; only this file is fetched.

    Raises:
        InputError: gated, unreachable or without a config, with the way on.
    """
    try:
        return Path(hf_hub_download(repo, "config.json", local_files_only=not online)).parent
    except _HUB_ERRORS as error:
        raise _hub_error(repo, error) from error


def download(repo: str, online: bool) -> Path:
    """Fetch a model from the Hub, or find it in the cache: safetensors, config, tokenizer, README and licence.

    Raises:
        InputError: gated or unreachable, with the way on.
    """
    try:
        return Path(
            snapshot_download(repo, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=not online)
        )
    except _HUB_ERRORS as error:
        raise _hub_error(repo, error) from error


def _hub_error(repo: str, error: Exception) -> InputError:
    details: dict[str, Any]
    if isinstance(error, GatedRepoError):
        details = {
            "problem": "this model is gated and your account has no access to it",
            "fix": f"accept its terms at https://huggingface.co/{repo}, then run `hf auth login`",
        }
    elif isinstance(error, RepositoryNotFoundError):
        details = {
            "problem": "neither a local path nor a model on the Hub, or it is private",
            "fix": _nearest(Path(repo)) + "; for a private model run `hf auth login`",
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
    return InputError("--model", repo, **details)
