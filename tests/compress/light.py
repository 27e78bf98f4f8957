"""What the tests of ``compress.worker`` send to other processes; it imports nothing that takes long."""

import os
import signal
import sys
from typing import NoReturn

from compress.calibrate.errors import InputError


def make() -> dict[str, int]:
    return {"made by": os.getpid()}


def refuse() -> NoReturn:
    raise InputError("--model", "x", "is no model", allowed="models", fix="name one")


def pid(thing: dict[str, int]) -> tuple[int, int]:
    """Who made the thing, and who answers."""
    return thing["made by"], os.getpid()


def keep(thing: dict[str, int], key: str, value: int) -> None:
    thing[key] = value


def get(thing: dict[str, int], key: str) -> int | None:
    return thing.get(key)


def bad_option(thing: object) -> NoReturn:
    raise InputError("--lengths", 9, "is too long")


def fail(thing: object) -> NoReturn:
    raise ZeroDivisionError("a fault of ours")


def leave(thing: object) -> NoReturn:
    sys.exit(3)


def die(thing: object, number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def interrupted(thing: object) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"
