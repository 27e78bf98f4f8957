"""What of a report may leave this machine: local paths become the names of their files, tokens vanish.

The report in the artifact's folder keeps full paths: ``--against dense`` and a repeated run need them. The model
card, and whatever a push sends, is made from the copy that :func:`shareable` returns.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from compress.calibrate.text import is_local

_TOKEN = re.compile(r"\bhf_\w{20,}")
_HOME = re.compile(r"(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s'\"]+")
_POSIX = re.compile(r"(?<![\w/:.<~$-])(?:~/(?:[^\s/'\"<>|]+/)*|/(?:[^\s/'\"<>|]+/)+)[^\s/'\"<>|]*")
_WINDOWS = re.compile(r"(?<!\w)(?:[A-Za-z]:|~)\\(?:[^\s\\'\"<>|]+\\)*[^\s\\'\"<>|]*")
_WORD = re.compile(r"[^\s{}\[\]\"',]+")


def shareable(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of a report without local paths, user names in them, and tokens.

    Sources that are on the Hub keep their names; a local one is named by its file or folder alone, in the command too.
    """
    cleaner = Cleaner(report)
    copy: dict[str, Any] = cleaner.value(report)
    copy["command"] = cleaner.command(report["command"])
    return copy


class Cleaner:
    """Takes local paths out of texts about one run.

    Args:
        report: of the run; the sources it names are taken out wherever they are mentioned, spaces and all.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        model, recipe = report["model"], report["recipe"]
        evaluations = [recipe.get("eval") or {}, (report.get("eval") or {}).get("settings") or {}]
        texts = [(report.get("calibration") or {}).get("source"), (recipe.get("calibration") or {}).get("source")]
        texts += [evaluation.get(key) for evaluation in evaluations for key in ("text", "haystack")]
        given: set[str] = {text for text in texts if text}
        local = {text for text in given if is_local(text)}
        self._public = given - local | {model["hub_id"]}
        local |= {path for evaluation in evaluations if (path := evaluation.get("task_path"))}
        if model["source"] and model["source"] != model["hub_id"]:
            local.add(model["source"])
        self._known = [(path, _name(path)) for path in sorted(local, key=len, reverse=True) if _name(path) != path]
        self._tails = [re.compile(rf"(?<![\w/:])~?/[^\n\"']*/{re.escape(name)}(?!\w)") for _, name in self._known]
        above = [folder for path in map(Path, local) for folder in path.parents]
        folders = {str(folder) for folder in (Path.cwd(), *Path.cwd().parents, *above) if _is_deep(folder)}
        longest_first = sorted((re.escape(folder) for folder in folders), key=len, reverse=True)
        self._folders = re.compile(rf"(?<![\w/.-])(?:{'|'.join(longest_first)})/") if folders else None

    def value(self, value: Any) -> Any:
        """A JSON value with every string cleaned, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(entry) for key, entry in value.items()}
        return [self.value(entry) for entry in value] if isinstance(value, list | tuple) else value

    def text(self, text: str) -> str:
        """Prose or one path, without the folders of local paths."""
        text = _TOKEN.sub("hf_***", text)
        if "/" not in text and "\\" not in text:
            return text
        for (path, name), tail in zip(self._known, self._tails, strict=True):
            text = tail.sub(name, text.replace(path, name))
        if self._folders is not None:
            text = self._folders.sub("~/", text)
        text = _HOME.sub("~", text.replace(f"{Path.home()}/", "~/"))
        for pattern in (_POSIX, _WINDOWS):
            text = pattern.sub(lambda found: _name(found[0]), text)
        return text

    def command(self, command: str) -> str:
        """A command line whose arguments name files and Hub repositories, but no folders."""
        try:
            words = shlex.split(command)
        except ValueError:  # an open quote
            words = []
        if words[:1] != ["compress"]:  # not a command line that we wrote
            return self.text(command)
        cleaned: list[str] = []
        for word in words:
            # a repository that was pushed to looks like a relative path
            cleaned.append(word if cleaned[-1:] == ["--push"] else self._argument(word))
        return shlex.join(cleaned)

    def _argument(self, word: str) -> str:
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "", word
        bare = value.strip("'\"")
        if bare not in self._public and ("/" in bare or "\\" in bare) and _WORD.fullmatch(bare.replace(" ", "_")):
            value = _name(bare)
        return self.text(key + equals + value)


def _is_deep(folder: Path) -> bool:
    """Whether a folder is somebody's rather than the system's, such as / and /tmp."""
    return folder.is_absolute() and len(folder.parts) > 2


def _name(path: str) -> str:
    """The last part of a path, of whichever system."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    return parts[-1] if parts else path
