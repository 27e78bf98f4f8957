"""Answers as OpenAI's API has them: whole objects, and chunks of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.generation import Piece, ScoredToken, Task, TokenScore
from compress.serving.engine import Job
from compress.serving.errors import ApiError

DONE = "data: [DONE]\n\n"


@dataclass
class Gathered:
    """What of an answer has come so far."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens = piece.tokens
        self.finish = piece.finish
        self.scores.extend(piece.scores)


class Reply:
    """Writes the answer to one request.

    Args:
        model: name that it bears.
        tasks: what was generated from.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tasks: Sequence[Task]) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._prompt_tokens = sum(len(task.prompt) for task in tasks)
        self._logprobs = any(task.logprobs is not None for task in tasks)
        self._gathered = [Gathered() for task in tasks for _ in range(task.answers)]

    async def whole(self, job: Job) -> dict[str, Any]:
        """The object that holds everything.

        Raises:
            ApiError: nothing came of it.
        """
        async for piece in job.pieces():
            self._gathered[piece.index].add(piece)
        choices = [self._choice(index, gathered) for index, gathered in enumerate(self._gathered)]
        return {**self._envelope(self.whole_object), "choices": choices, "usage": self._usage()}

    async def events(self, job: Job, with_usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events; an error becomes one of them, since the status is out already."""
        for index in range(len(self._gathered)):
            for choice in self._first(index):
                yield self._event([choice], with_usage)
        try:
            async for piece in job.pieces():
                self._gathered[piece.index].tokens = piece.tokens
                if piece.text or piece.scores:
                    yield self._event([self._delta(piece.index, replace(piece, finish=None))], with_usage)
                if piece.finish:
                    last = replace(piece, text="", scores=())
                    yield self._event([self._delta(piece.index, last)], with_usage)
        except ApiError as error:
            yield _sse(error.body())
            return
        if with_usage:
            yield _sse({**self._envelope(self.chunk_object), "choices": [], "usage": self._usage()})
        yield DONE

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, choices: list[dict[str, Any]], with_usage: bool) -> str:
        usage = {"usage": None} if with_usage else {}
        return _sse({**self._envelope(self.chunk_object), "choices": choices, **usage})

    def _usage(self) -> dict[str, int]:
        answered = sum(gathered.tokens for gathered in self._gathered)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self._prompt_tokens + answered,
        }

    def _first(self, index: int) -> list[dict[str, Any]]:
        """What is sent of an answer before any of its text."""
        return []

    def _choice(self, index: int, gathered: Gathered) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    """Of ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _first(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _choice(self, index: int, gathered: Gathered) -> dict[str, Any]:
        message = {"role": "assistant", "content": gathered.text, "refusal": None}
        logprobs = self._scores(gathered.scores)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": gathered.finish}

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {} if piece.finish else {"content": piece.text}
        logprobs = self._scores(piece.scores) if piece.scores else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [{**_token(score.chosen), "top_logprobs": [_token(token) for token in score.top]} for score in scores]
        return {"content": content, "refusal": None}


class TextReply(Reply):
    """Of ``/v1/completions``."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _choice(self, index: int, gathered: Gathered) -> dict[str, Any]:
        logprobs = self._scores(gathered.scores)
        return {"index": index, "text": gathered.text, "logprobs": logprobs, "finish_reason": gathered.finish}

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._scores(piece.scores) if piece.scores else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "tokens": [score.chosen.text for score in scores],
            "token_logprobs": [score.chosen.logprob for score in scores],
            "top_logprobs": [{token.text: token.logprob for token in score.top} for score in scores],
            "text_offset": [score.offset for score in scores],
        }


def _token(token: ScoredToken) -> dict[str, Any]:
    """Bytes are those of the text; a token that is part of a character has no text to take them from."""
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()) if token.whole else None}


def _sse(data: dict[str, Any]) -> str:
    # ASCII only: some clients end a line at every character that Unicode calls a line break.
    return f"data: {json.dumps(data)}\n\n"
