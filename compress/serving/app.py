"""The application: routes, and how everything that goes wrong becomes an answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.generation import Task
from compress.serving.engine import Engine
from compress.serving.errors import ApiError, server_fault
from compress.serving.guard import Guard
from compress.serving.prepare import Preparer
from compress.serving.replies import ChatReply, Reply, TextReply
from compress.serving.schema import ChatRequest, CompletionRequest
from compress.serving.settings import Settings


def create_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings | None = None) -> FastAPI:
    """An OpenAI-compatible application around a model, to be run by any ASGI server.

    ``app.state.engine`` is its :class:`~compress.serving.engine.Engine`, closed when the server shuts down.

    Args:
        model: a decoder in eval mode, as ``compress.load`` gives it; several threads call it.
        tokenizer: of the model.
        settings: limits and names.
    """
    settings = settings or Settings()
    engine = Engine(model, tokenizer, workers=settings.max_concurrent, queue=settings.max_queue)
    service = _Service(engine, Preparer(model, tokenizer), settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # The pages with documentation load their scripts from elsewhere, which a server of one's own shouldn't.
    app = FastAPI(title="compress", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.add_middleware(Guard, settings=settings)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.one_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.completion, methods=["POST"], response_model=None)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(HTTPException, _refuse_path)
    app.add_exception_handler(Exception, _fail)  # what the server's log shows, in the shape that clients expect
    return app


class _Service:
    """The routes."""

    def __init__(self, engine: Engine, preparer: Preparer, settings: Settings) -> None:
        self._engine, self._preparer, self._name = engine, preparer, settings.served_name
        self._created = int(time.time())

    async def health(self) -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """That model by name."""
        self._check_name(name)
        return self._model()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(body, request, partial(self._preparer.chat, body), ChatReply)

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(body, request, partial(self._preparer.completion, body), TextReply)

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        prepare: Callable[[], Sequence[Task]],
        reply_class: type[Reply],
    ) -> Response:
        body.require_honourable()
        self._check_name(body.model)
        with ExitStack() as stack:
            stack.enter_context(self._engine.admitted())
            tasks = await self._engine.prepare(prepare)
            job = stack.enter_context(self._engine.running(tasks))
            reply = reply_class(self._name, tasks)
            if body.stream:
                with_usage = body.stream_options is not None and body.stream_options.include_usage
                return _Stream(reply.events(job, with_usage), stack.pop_all())
            watch = asyncio.create_task(_gone(request))
            stack.callback(watch.cancel)
            watch.add_done_callback(lambda _: job.cancel())
            return JSONResponse(await reply.whole(job))

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise ApiError(404, f"the model served here is {self._name!r}", param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "compress",
            "max_model_len": self._preparer.context,
        }


class _Stream(StreamingResponse):
    """Server-sent events; the stack is closed when the last is out or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], stack: ExitStack) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _gone(request: Request) -> None:
    """Returns when the client has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _refuse_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _refuse(request, ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}"))
    path = ".".join(str(part) for part in first["loc"][1:])
    if not path:
        return await _refuse(request, ApiError(400, "the body has to be a JSON object, sent as application/json"))
    return await _refuse(
        request,
        ApiError(400, f"'{path}': {first['msg'].removeprefix('Value error, ')}", param=path, code="invalid_value"),
    )


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return await _refuse(request, ApiError(error.status_code, str(error.detail), headers=headers))


async def _fail(request: Request, error: Exception) -> Response:
    return await _refuse(request, server_fault())
