"""The process of ``compress serve``: checks, a socket, the model, and an end without loose threads."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from compress.calibrate.errors import InputError
from compress.device import pick_device
from compress.options import ServeOptions
from compress.runtime import load
from compress.serving.app import create_app
from compress.serving.engine import Engine
from compress.serving.listen import bind, is_loopback, read_key
from compress.serving.settings import Settings

_AFTER_GRACE = 10  # seconds in which requests that were called off have to end
_CONNECTIONS = 1024  # further ones are answered with 503


def serve(
    model: str,
    options: ServeOptions | None = None,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; requests that run may then take ``grace_seconds`` to end.

    Everything that can be wrong with the options is found before the model is loaded.

    Args:
        model: an artifact, a Hub id, a folder or a ``.gguf`` file.
        options: where and how.
        on_ready: called with the base URL for clients once they can connect.
        on_warning: called with what the user should know.

    Raises:
        InputError: an option that can't be had, or no such model.
    """
    options = options or ServeOptions()
    key = None if options.api_key_file is None else read_key(options.api_key_file)
    pick_device(options.device)
    with contextlib.closing(bind(options.host, options.port)) as listener:
        address = listener.getsockname()
        local = is_loopback(address[0])
        if key is None and not local:
            on_warning(f"everyone who reaches {address[0]} can use this server; --api-key-file asks for a key")
        loaded, tokenizer = load(
            model,
            device=options.device,
            activations=options.activations,
            threads=options.threads,
            kv=options.kv,
            trust_remote_code=options.trust_remote_code,
        )
        settings = Settings(
            served_name=options.served_name or default_name(model),
            api_key=key,
            local_only=local and key is None,
            max_request_bytes=options.max_request_bytes,
            max_concurrent=options.max_concurrent,
            max_queue=options.max_queue,
        )
        app = create_app(loaded, tokenizer, settings)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=options.grace_seconds + _AFTER_GRACE,
        )
        server = _Server(config, app.state.engine, options.grace_seconds)
        with server.stopped_by_signals():
            try:
                listener.listen(config.backlog)
            except OSError as error:  # another server took the port while the model was loaded
                raise InputError("--port", address[1], f"can't be served at: {error.strerror}") from error
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            on_ready(f"http://{host}:{address[1]}/v1")
            try:
                server.run(sockets=[listener])
            finally:
                app.state.engine.close()


def default_name(model: str) -> str:
    """What requests call a model: the name of its folder or file, or its Hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


class _Server(uvicorn.Server):
    """uvicorn's server, with a limit for requests that run when it is told to stop.

    Args:
        config: of the server.
        engine: where they run.
        grace_seconds: how long they may go on.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_seconds: int) -> None:
        super().__init__(config)
        self._engine, self._grace_seconds = engine, grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for what runs, call it off after the grace period."""
        calling_off = asyncio.get_running_loop().call_later(self._grace_seconds, self._engine.cancel)
        try:
            await super().shutdown(sockets)
        finally:
            calling_off.cancel()

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server in good order, before it takes them over and when it hands them back."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
