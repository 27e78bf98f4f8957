"""The one exception that means "the user can mend this": a line of text, shown without a traceback, exit code 2."""

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any


class InputError(ValueError):
    """Bad input, told in one line: the option, its value, what is wrong, what is allowed, and the nearest fix.

    Args:
        option: the command-line option or recipe key, as the user writes it (``--model``, ``weights.bits``).
        value: what was given.
        problem: what is wrong with it, as a clause without a full stop.
        allowed: the valid values or range, if they can be listed.
        fix: what to do instead.
    """

    def __init__(
        self, option: str, value: object, problem: str, *, allowed: str | None = None, fix: str | None = None
    ) -> None:
        self.option = option
        self.value = value
        self.problem = problem
        self.allowed = allowed
        self.fix = fix
        text = f"{option}={value}: {problem}" if value is not None else f"{option}: {problem}"
        if allowed:
            text += f"; allowed: {allowed}"
        if fix:
            text += f"; {fix}"
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which hands it to another process and would call the class with the text alone."""
        return partial(InputError, allowed=self.allowed, fix=self.fix), (self.option, self.value, self.problem)

    def under(self, option: str) -> "InputError":
        """The same error under another option."""
        return InputError(option, self.value, self.problem, allowed=self.allowed, fix=self.fix)


def did_you_mean(name: str, choices: Iterable[str]) -> str | None:
    """The sentence "did you mean X?" for the nearest valid name, or None when nothing is near."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None
