"""What a search among packed keys asks of the cache that packs them."""

from typing import Protocol

from compress.calibrate.errors import InputError
from compress.sparse.sea_file import POLICY


class Kept(Protocol):
    """What a packed cache keeps apart: the section ``kv``, or a plan's packing."""

    @property
    def sinks(self) -> int:
        """First tokens."""

    @property
    def window_min(self) -> int:
        """Newest tokens that are never packed."""

    @property
    def flush(self) -> int:
        """Tokens beyond them that are packed at once."""

    @property
    def first_flush(self) -> int:
        """Tokens that are there before anything is packed."""


def unpacked(kept: Kept) -> int:
    """The most newest tokens that aren't packed."""
    return max(kept.window_min + kept.flush, kept.first_flush)


def check_packed(method: str, sink: int, window: int, kept: Kept) -> None:
    """See that a method can search among packed keys.

    Args:
        method: of the section ``sparse``.
        sink: first tokens that are always attended.
        window: newest ones.
        kept: what the cache keeps apart.

    Raises:
        InputError: a method that has to see all keys as they came; sinks or a window below what isn't packed.
    """
    if method == POLICY:
        problem = "estimates attention from all keys as they came, and the section kv packs them"
        raise InputError("sparse.method", POLICY, problem, allowed="hip, quest, block_mean", fix="sparse.method=hip")
    for name, value, least in (("sink", sink, kept.sinks), ("window", window, unpacked(kept))):
        if value < least:
            problem = "is less than what the packed cache keeps apart"
            raise InputError(f"sparse.{name}", value, problem, allowed=f"from {least}", fix=f"sparse.{name}={least}")
