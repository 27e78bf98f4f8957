"""Text of tokens as they come: whole characters only, and never the beginning of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT = 5  # tokens of the prompt that are decoded with the first of the answer, so that its space is right
_BROKEN = 3  # bytes at most of a character whose last byte is still to come
REPLACEMENT = "\ufffd"  # what a tokenizer writes for those


class TextStream:
    """Decodes one answer token by token.

    The pieces joined are the text of all tokens together, up to the first stop string, whose tokens may begin and end
    anywhere.

    Args:
        tokenizer: of the model; special tokens are left out of the text.
        prompt: token ids before the answer.
        stop: strings that end the answer and aren't part of it.

    Attributes:
        decoded: characters decoded so far, those held back among them.
        released: characters handed out so far.
        stopped: a stop string was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.decoded = 0
        self.released = 0
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._next_start = 0, len(self._ids)
        self._shown = len(self._window())
        self._held = ""

    def push(self, token: int) -> str:
        """The text that a further token makes certain, which may be empty."""
        self._ids.append(token)
        return self._release(self._fresh(final=False), final=False)

    def finish(self) -> str:
        """What is still held back when no token follows."""
        return self._release(self._fresh(final=True), final=True)

    def _window(self) -> str:
        """The last tokens as text: those not handed out, after some that were."""
        ids = self._ids[self._start :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _fresh(self, final: bool) -> str:
        window = self._window()
        end = len(window) if final else len(window) - _broken(window)
        text = window[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(window):
            self._start, self._next_start = self._next_start, len(self._ids)
            self._shown = len(self._window())
        self.decoded += len(text)
        return text

    def _release(self, fresh: str, final: bool) -> str:
        self._held += fresh
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
        else:
            certain = len(self._held) - (0 if final else self._begun())
            text, self._held = self._held[:certain], self._held[certain:]
        self.released += len(text)
        return text

    def _begun(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _broken(text: str) -> int:
    """How many characters at the end may yet become another one."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), _BROKEN)
