"""Which tasks there are, and which files a set of task names needs: a user's folder first, then lm-eval's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compress.calibrate.errors import InputError, did_you_mean
from compress.evalsuite.builtin_tasks import BuiltinTasks, find_builtin_tasks
from compress.evalsuite.task_folder import TaskFile, check_data_files, read_task_file, read_task_folder

PERPLEXITY = "perplexity"
DIVERGENCE = "divergence"
LONG_CONTEXT = (
    "passkey",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "line_retrieval",
)
"""Questions about a long context; importing what asks them takes seconds."""

OWN_TASKS = (PERPLEXITY, DIVERGENCE, *LONG_CONTEXT)
"""The tasks that are ours; lm-eval's of the same name, which need the network, can't be asked for."""


@dataclass
class Selection:
    """The files that a set of task names needs.

    Attributes:
        local: tasks and groups of the user's folder, by name.
        builtin: lm-eval's own tasks and groups, by name.
        tags: members of each tag that was asked for.
    """

    local: dict[str, TaskFile] = field(default_factory=dict)
    builtin: dict[str, Path] = field(default_factory=dict)
    tags: dict[str, set[str]] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        """The file of a task or group; None for a tag, and for a task that is written out in a group's file."""
        return self.local[name].path if name in self.local else self.builtin.get(name)

    def members(self, name: str) -> list[str]:
        """The names that a tag, or a group of the user's folder, stands for; none for a task."""
        own = self.local[name].children if name in self.local else ()
        return sorted(self.tags.get(name, own))


def validate_tasks(tasks: Sequence[str], task_path: str | None = None) -> None:
    """See that tasks can be run, before any model is loaded; takes well under a second.

    Args:
        tasks: names of lm-eval tasks, groups or tags, or of our own tasks.
        task_path: folder of lm-eval task files.

    Raises:
        InputError: ``task_path`` isn't a folder; a task doesn't exist; a local task's data file is missing or empty.
    """
    select_tasks(tasks, task_path)


def text_tasks(tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that are measured on a plain text."""
    return [name for name in tasks if name in (PERPLEXITY, DIVERGENCE)]


def long_context_tasks(tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that ask about a long context."""
    return [name for name in tasks if name in LONG_CONTEXT]


def harness_tasks(tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that are lm-eval's, or of the user's folder."""
    return [name for name in tasks if name not in OWN_TASKS]


def select_tasks(tasks: Sequence[str], task_path: str | None = None) -> Selection:
    """The files that tasks need, after the checks of ``validate_tasks``."""
    selection = Catalogue(task_path).select(tasks)
    for file in selection.local.values():
        check_data_files(file)
    return selection


class Catalogue:
    """All tasks within reach; lm-eval's own are only searched when a name isn't found in the folder.

    Args:
        task_path: folder of lm-eval task files, or None.

    Raises:
        InputError: ``task_path`` isn't a folder.
    """

    def __init__(self, task_path: str | None) -> None:
        self.folder = Path(task_path).expanduser().resolve() if task_path is not None else None
        if self.folder is not None and not self.folder.is_dir():
            fix = "give the folder that holds the task files" if self.folder.is_file() else None
            raise InputError("eval.task_path", task_path, "not a folder", fix=fix)
        self.local = read_task_folder(self.folder) if self.folder is not None else {}
        self.local_tags: dict[str, set[str]] = {}
        for file in self.local.values():
            for tag in file.tags:
                self.local_tags.setdefault(tag, set()).add(file.name)

    @cached_property
    def builtin(self) -> BuiltinTasks:
        """lm-eval's own tasks."""
        return find_builtin_tasks()

    def suggestion(self, name: str) -> str | None:
        """The sentence "did you mean X?", for a name that doesn't exist; the user's own tasks come first."""
        # Of 14,000 names only those with the same first letter and about the same length: a tenth of the time.
        builtin = [other for other in self.builtin.names() if other[:1] == name[:1] and abs(len(other) - len(name)) < 5]
        return did_you_mean(name, [*OWN_TASKS, *self.local, *self.local_tags]) or did_you_mean(name, builtin)

    def select(self, tasks: Sequence[str]) -> Selection:
        """The files that tasks and, for groups and tags, their members need; our own tasks need none.

        Raises:
            InputError: a task, or a member of a group of the user's folder, doesn't exist.
        """
        selection = Selection()
        for name in harness_tasks(tasks):
            if not self._add(name, selection):
                raise InputError("eval.tasks", name, "no such task", fix=self.suggestion(name))
        return selection

    def _add(self, name: str, selection: Selection) -> bool:
        """Add a name and its members to the selection; False if there is no such name."""
        if name in selection.local or name in selection.builtin or name in selection.tags:
            return True
        if name in self.local:
            self._add_local(self.local[name], selection)
        elif name in self.local_tags:
            selection.tags[name] = self.local_tags[name]
            for member in self.local_tags[name]:
                self._add(member, selection)
        elif name in self.builtin.files:
            selection.builtin[name] = self.builtin.files[name]
            file = read_task_file(self.builtin.files[name])
            for child in file.children if file is not None else ():
                self._add(child, selection)
        elif name in self.builtin.tags:
            selection.tags[name] = set(self.builtin.tags[name])
            for member in self.builtin.tags[name]:
                self._add(member, selection)
        else:
            return False
        return True

    def _add_local(self, file: TaskFile, selection: Selection) -> None:
        selection.local[file.name] = file
        for child in file.children:
            if not self._add(child, selection):
                raise InputError(
                    "eval.tasks",
                    child,
                    f"no such task, but the group {file.name} in {file.path} asks for it",
                    fix=self.suggestion(child),
                )
