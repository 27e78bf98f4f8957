"""What goes up when an artifact is pushed: its own files and nothing else, without what only concerns this machine.

Weights, tokenizer and config go as they are. Report, recipe, page and card go as copies without local paths
(``compress.artifact.privacy``); the report's hash of the recipe is that of the copy, so that the artifact is intact
for whoever downloads it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compress.artifact.card import model_card, titled
from compress.artifact.export import read_report
from compress.artifact.inspect import inspect
from compress.artifact.layout import report_text
from compress.artifact.privacy import Cleaner, shareable
from compress.artifact.target import Remote
from compress.calibrate.errors import InputError
from compress.evalsuite.report import render
from compress.recipe import Recipe
from compress.work import STATE, SUFFIX, partial_folder

REPORT, CARD, PAGE, RECIPE = "report.json", "README.md", "report.html", "recipe.yaml"


@dataclass(frozen=True)
class Outgoing:
    """One file: its name in the repository, its content or where that is, and its size and hash."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    def same_as(self, remote: Remote) -> bool:
        """Whether the Hub has this very content."""
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        if remote.size != self.size:
            return False
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return remote.git_hash == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_finished(folder: Path) -> dict[str, Any]:
    """The report of a finished artifact; its files aren't read yet.

    Raises:
        InputError: no folder, no artifact, or one whose run isn't finished.
    """
    again = "give the command of its run again to finish it"
    if (folder / STATE).is_file() or (folder.parent / STATE).is_file():
        raise InputError("DIR", folder, "is the work of an unfinished run", fix=again)
    if not folder.is_dir():
        if (partial_folder(folder) / STATE).is_file():
            raise InputError("DIR", folder, f"isn't finished: its work is in {folder.name}{SUFFIX}", fix=again)
        raise InputError("DIR", folder, "there is no such folder")
    report = read_report(folder)
    if report is None:
        raise InputError(
            "DIR", folder, "isn't an artifact: it has no report.json of ours", fix="make one with `compress run`"
        )
    if report.get("seconds") is None:
        raise InputError("DIR", folder, "isn't finished: its run was stopped before the scores", fix=again)
    return report


def outgoing(folder: Path, repo: str) -> tuple[list[Outgoing], list[str]]:
    """The files to push, and the names of what stands beside them in the folder and stays here.

    Args:
        folder: a finished artifact.
        repo: ``ORG/NAME``, which the card names.

    Raises:
        InputError: a file is missing or damaged.
    """
    found = inspect(folder)
    if found.damaged or found.report is None:
        problem = f"is damaged: {', '.join(found.damaged)} changed since it was written, or is gone"
        raise InputError("DIR", folder, problem, fix="make it again with `compress run`")
    listed = found.report["artifact"]["files"]
    for name in listed:
        if PurePosixPath(name).is_absolute() or any(part.startswith(".") for part in PurePosixPath(name).parts):
            raise InputError("DIR", folder, f"its report lists {name!r}, which can't be a file of an artifact")
    files = [Outgoing(name, folder / name, facts["bytes"], facts["sha256"]) for name, facts in listed.items()]
    files = _with_copies(folder, repo, found.report, files)
    names = {PurePosixPath(file.name).parts[0] for file in files}
    return sorted(files, key=lambda file: file.name), sorted(
        entry.name for entry in folder.iterdir() if entry.name not in names
    )


def _with_copies(folder: Path, repo: str, report: dict[str, Any], files: list[Outgoing]) -> list[Outgoing]:
    """``files`` with clean copies of what may name local paths."""
    clean = shareable(report)
    made = []
    if clean["recipe"] != report["recipe"]:
        recipe = _text(RECIPE, Recipe.load(clean["recipe"]).to_yaml())
        clean["artifact"]["files"][RECIPE] = {"bytes": recipe.size, "sha256": recipe.sha256}
        made.append(recipe)
    made.append(_text(REPORT, report_text(clean)))
    made.append(_text(CARD, _card(folder / CARD, repo, report)))
    if (folder / PAGE).is_file():
        made.append(_text(PAGE, render(clean, repo)))
    replaced = {file.name for file in made}
    return [file for file in files if file.name not in replaced] + made


def _card(path: Path, repo: str, report: dict[str, Any]) -> str:
    """The card for the Hub, where the model is loaded by its repository's name; one edited by hand keeps its text."""
    namespace, _, name = repo.partition("/")
    local = path.read_text(encoding="utf-8") if path.is_file() and not path.is_symlink() else None
    if local is not None and (title := titled(local)) is not None and local != model_card(report, title):
        return Cleaner(report).text(local)
    return model_card(report, name, repo, namespace)


def _text(name: str, text: str) -> Outgoing:
    data = text.encode("utf-8")
    return Outgoing(name, data, len(data), hashlib.sha256(data).hexdigest())
