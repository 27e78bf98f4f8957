"""What is at the place where a push goes, asked before anything is sent or computed."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

from compress.artifact.account import Destination, check_id, check_namespace, open_account, refusal
from compress.artifact.privacy import Cleaner
from compress.calibrate.hub import hub_problem
from compress.recipe import Recipe
from compress.work import changed

_COMPARED = ("calibration", "weights", "export")  # sections of a recipe that decide what an artifact is
_HARMLESS = (".*", "README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Remote:
    """A file on the Hub: its size, and its sha256 if it is in large-file storage, else git's hash of it."""

    size: int
    sha256: str | None
    git_hash: str | None


@dataclass(frozen=True)
class Target:
    """A destination that this account may write to, and what is there.

    Attributes:
        destination: as asked for.
        url: of its page.
        head: the last commit; None if the repository doesn't exist yet.
        private: whether it is private now; None if it doesn't exist yet.
        files: what it holds.
        report: of the artifact that it holds, if it holds one.
    """

    destination: Destination
    url: str
    head: str | None
    private: bool | None
    files: dict[str, Remote]
    report: dict[str, Any] | None

    def __str__(self) -> str:
        visible = "public" if self.destination.public else "private"
        if self.head is None:
            return f"{self.url} ({visible}, new)"
        return f"{self.url} ({visible}{', private until now' if visible == 'public' and self.private else ''})"

    def check_content(self, fingerprint: dict[str, Any]) -> None:
        """Refuse to mix an artifact with what is in the repository.

        Args:
            fingerprint: of the artifact, as far as it is known; keys that it lacks are not compared.

        Raises:
            InputError: the repository holds another artifact, or something else.
        """
        if self.destination.overwrite or all(_harmless(name) for name in self.files):
            return
        fix = "choose another name, or replace it with `compress push --overwrite` (its history keeps the old files)"
        if self.report is None:
            other = next(name for name in self.files if not _harmless(name))
            raise self.destination.error(f"the repository holds something else ({other})", fix)
        if changes := changed(self.report["fingerprint"], fingerprint):
            raise self.destination.error(f"the repository holds another artifact: {'; '.join(changes)}", fix)


def open_target(destination: Destination) -> Target:
    """Ask the Hub about a destination.

    Raises:
        InputError: an impossible name, no connection, no valid token, no right to write there.
    """
    check_id(destination)
    if (problem := hub_problem()) is not None:
        raise destination.error(problem, "push from a machine that reaches it; the artifact can be copied there")
    api = HfApi()
    account = open_account(api, destination)
    try:
        info = api.model_info(destination.repo, files_metadata=True)
    except RepositoryNotFoundError:
        check_namespace(account, destination)
        return Target(destination, f"{api.endpoint}/{destination.repo}", None, None, {}, None)
    except (HTTPError, OSError) as error:
        raise refusal(error, destination) from error
    try:
        api.auth_check(destination.repo, write=True)
    except (HTTPError, OSError) as error:
        raise refusal(error, destination) from error
    if info.private is False and not destination.public:
        raise destination.error("is public already, and a push is private unless it is said otherwise", "add --public")
    files = {
        file.rfilename: Remote(file.size or 0, None if file.lfs is None else file.lfs.sha256, file.blob_id)
        for file in info.siblings or []
    }
    report = _report(api, destination, str(info.sha)) if "report.json" in files else None
    return Target(destination, f"{api.endpoint}/{destination.repo}", info.sha, bool(info.private), files, report)


def check_push(destination: Destination, recipe: Recipe) -> Target:
    """Preflight of a run that ends with a push: everything that can be known before the run.

    Raises:
        InputError: as :func:`open_target`; the repository holds another artifact, or something else.
    """
    target = open_target(destination)
    content = recipe.model_dump(mode="json")
    blank = {"model": {"source": None, "hub_id": None}, "recipe": content}
    target.check_content({"recipe": Cleaner(blank).value({key: content[key] for key in _COMPARED})})
    return target


def _report(api: HfApi, destination: Destination, head: str) -> dict[str, Any] | None:
    """The report in the repository, or None if it isn't one of ours."""
    try:
        with TemporaryDirectory() as folder:
            path = Path(api.hf_hub_download(destination.repo, "report.json", revision=head, local_dir=folder))
            report = json.loads(path.read_text(encoding="utf-8"))
    except (HTTPError, OSError) as error:
        raise refusal(error, destination) from error
    except ValueError:
        return None
    sections = [report.get(key) for key in ("artifact", "fingerprint")] if isinstance(report, dict) else [None]
    return report if all(isinstance(section, dict) for section in sections) else None


def _harmless(name: str) -> bool:
    """Whether a file may be in the repository before the first push: what the Hub's own page makes, and licences."""
    return any(fnmatch(name, pattern) for pattern in _HARMLESS)
