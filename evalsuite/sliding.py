"""How a text is cut into windows, and which tokens of each are scored."""

from dataclasses import dataclass
from typing import Any

from compress.calibrate.errors import InputError

KV_CHUNK = 64
"""Tokens that go through a cache at once behind a window's prompt, if nothing else is said."""


@dataclass(frozen=True)
class Feed:
    """How a window goes through a cache, so that what the cache keeps is what scored tokens see.

    Attention over a prompt that is given at once sees its keys and values as they were computed, whatever the cache
    makes of them. So the prompt only fills the cache, and the tokens behind it, which are scored, follow in chunks, as
    they do when a model answers: each sees what the cache has kept of the chunks before, and its own chunk as computed.

    Attributes:
        prompt: tokens at the beginning of a window, given at once and not scored.
        chunk: tokens at once behind it; 1 is token by token, as in generation.
    """

    prompt: int
    chunk: int = KV_CHUNK

    @classmethod
    def half(cls, window: int) -> "Feed":
        """A prompt of half a window."""
        return cls(max(1, window // 2))

    def sizes(self, window: int) -> list[int]:
        """Tokens of every forward pass over a window."""
        rest = window - self.prompt
        return [self.prompt, *[self.chunk] * (rest // self.chunk), *([rest % self.chunk] if rest % self.chunk else [])]


@dataclass(frozen=True)
class Windows:
    """Windows over a text, from its start.

    The convention is Hugging Face's: a window begins ``stride`` tokens behind the one before it, every token is scored
    once, and what a window shares with the one before it is context only. Without a stride windows don't overlap. The
    first token of a text, and of a window without context, can't be predicted. Only whole windows count. What is given
    as a prompt before a cache is measured is context too.

    Attributes:
        window: tokens a window.
        stride: tokens between the beginnings of two windows; None, or the window itself, for no overlap.
        count: number of windows.
        feed: how windows go through a cache; None gives them at once.
    """

    window: int
    stride: int | None
    count: int
    feed: Feed | None = None

    @property
    def name(self) -> str:
        """``1024`` without overlap, ``1024/512`` with a stride of 512, ``512:1024`` behind a prompt of 512 tokens."""
        whole = f"{self.window}/{self.stride}" if self._overlap else str(self.window)
        return whole if self.feed is None or self.feed.prompt == 1 else f"{self.feed.prompt}:{whole}"

    @property
    def length(self) -> int:
        """Tokens of text that the windows cover."""
        return (self.count - 1) * self._step + self.window

    @property
    def scored(self) -> tuple[int, ...]:
        """Number of scored tokens of each window."""
        return tuple(self.window - self.context(index) for index in range(self.count))

    @property
    def weights(self) -> tuple[int, ...] | None:
        """``scored`` where it isn't the same for all windows, otherwise None."""
        return self.scored if len(set(self.scored)) > 1 else None

    def start(self, index: int) -> int:
        """Where a window begins in the text."""
        return index * self._step

    def context(self, index: int) -> int:
        """Tokens at the beginning of a window that aren't scored."""
        shared = self.window - self._step if index and self._overlap else 1
        return shared if self.feed is None else max(shared, self.feed.prompt)

    @property
    def _step(self) -> int:
        return self.window if self.stride is None else self.stride

    @property
    def _overlap(self) -> bool:
        return self._step < self.window


def check_windows(
    window: int, stride: int | None, windows: int | None, context: int | None, feed: Feed | None = None
) -> None:
    """Find windows that no text could be cut into, before a model is loaded.

    Args:
        window: tokens a window.
        stride: tokens between the beginnings of two windows, or None.
        windows: how many windows, or None.
        context: the longest sequence that the model takes, or None.
        feed: how windows go through a cache, or None.

    Raises:
        InputError: a window shorter than 2 or beyond the model's context, a stride beyond the window, no window; a
            prompt that leaves nothing to score, an empty chunk.
    """
    if window < 2:
        raise InputError("eval.window", window, "a window holds at least two tokens", allowed="2 or more")
    if stride is not None and not 1 <= stride <= window:
        problem = "would leave tokens out between two windows" if stride > window else "windows must move on"
        raise InputError("eval.stride", stride, problem, allowed=f"1 to {window}, the window")
    if windows is not None and windows < 1:
        raise InputError("eval.windows", windows, "nothing to score", allowed="1 or more")
    if context is not None and window > context:
        raise InputError("eval.window", window, "is longer than the model's context", allowed=f"2 to {context}")
    if feed is not None and not 1 <= feed.prompt < window:
        problem = "a window begins with a prompt" if feed.prompt < 1 else "would leave nothing of a window to score"
        raise InputError("eval.kv_prompt", feed.prompt, problem, allowed=f"1 to {window - 1}")
    if feed is not None and feed.chunk < 1:
        raise InputError("eval.kv_chunk", feed.chunk, "a window would never end", allowed="1 or more")


def lay_out(
    tokens: int, window: int, stride: int | None = None, windows: int | None = None, feed: Feed | None = None
) -> Windows:
    """The first ``windows`` windows of a text, or as many as it holds.

    Args:
        tokens: length of the text.
        window: tokens a window.
        stride: tokens between the beginnings of two windows, or None for no overlap.
        windows: how many at most; None for all.
        feed: how they go through a cache; None gives them at once.

    Raises:
        InputError: the text is shorter than a window.
    """
    if tokens < window:
        fix = "use a longer text" + (f" or a window of at most {tokens}" if tokens > 1 else "")
        raise InputError("eval.window", window, f"the text holds only {tokens} tokens", fix=fix)
    available = (tokens - window) // (window if stride is None else stride) + 1
    return Windows(window, stride, available if windows is None else min(windows, available), feed)


def context_of(config: Any) -> int | None:
    """The longest sequence that a model's transformers config allows, or None where it names none."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context
