"""Where ``compress eval`` leaves its figures: a JSON file of its own, or a folder in lm-eval's layout."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact.layout import report_text
from compress.calibrate.errors import InputError
from compress.evalsuite.catalogue import harness_tasks
from compress.evalsuite.harness import Samples
from compress.evalsuite.results_folder import write_results_folder
from compress.evalsuite.scores import Scores
from compress.work import write_text


@dataclass(frozen=True)
class Output:
    """A place for the figures.

    Attributes:
        path: a file, if its name ends in ``.json``, otherwise a folder.
        log_samples: in the folder, also every question with its answer, as lm-eval's ``--log_samples``.
    """

    path: Path
    log_samples: bool = False

    def check(self, tasks: Sequence[str]) -> None:
        """See that it can be written, before anything else is done.

        Raises:
            InputError: the place can't be written to; samples for a file, or without a task of lm-eval.
        """
        if self.log_samples and self._is_file:
            raise InputError("--log-samples", None, f"needs a folder, and {self.path} is the name of a file")
        if self.log_samples and not harness_tasks(tasks):
            raise InputError("--log-samples", None, "there is no task of lm-eval, whose questions could be logged")
        path = self.path.absolute()
        if self._is_file:
            there = path.parent
            if path.is_dir():
                raise InputError("--output", self.path, "is a folder, where a name in .json means a file")
            if not there.exists():
                raise InputError("--output", self.path, f"there is no folder {there}")
        else:
            there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise InputError("--output", self.path, f"{there} is not a folder", fix="a file's name ends in .json")
        if not os.access(there, os.W_OK):
            raise InputError("--output", self.path, f"{there} can't be written to", fix="choose another place")

    def keep(self, model: str, scores: Scores, samples: Samples, chat_template: str | None) -> None:
        """Write one model's figures, if this is a folder.

        Args:
            model: as the user named it.
            scores: its figures.
            samples: what lm-eval logged; it is changed.
            chat_template: in which questions were asked, if they were.
        """
        if not self._is_file:
            write_results_folder(self.path, model, scores, samples if self.log_samples else None, chat_template)

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Write everything, if this is a file."""
        if self._is_file:
            write_text(self.path, report_text(dict(outcome)))

    @property
    def _is_file(self) -> bool:
        return self.path.suffix == ".json"
