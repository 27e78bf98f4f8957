"""``compress serve`` as a process: what it prints, how it ends, and what it refuses before a model is loaded."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compress.cli.main import main
from openai import APIError, OpenAI
from runs import refused

from compress.options import ServeOptions
from compress.serving import server

COMMAND = [sys.executable, "-c", "from compress.cli.main import main; main()", "serve"]
Tiny = Callable[[str], Path]


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the URL that it prints; it is killed if the test fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *arguments, "--port", "0"], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C stops\)\n", line)
            assert found, (line, process.stderr and process.stderr.read())
            yield process, found.group(1)
        finally:
            process.kill()


def ask(url: str, key: str = "unused") -> tuple[str, Iterator[Any]]:
    """The first words of a long answer, and its further chunks."""
    client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    assert [found.id for found in client.models.list()] == ["llama"]
    asked: dict[str, Any] = {"model": "llama", "prompt": "in a hen", "logit_bias": {"100": 100}, "max_tokens": 500}
    stream = iter(client.completions.create(**asked, stream=True))
    return next(stream).choices[0].text, stream


def test_requests_that_run_are_answered_after_sigterm(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret\n")
    with running(str(tiny("llama")), "--api-key-file", str(tmp_path / "key")) as (process, url):
        text, stream = ask(url, "sk-secret")
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len(text + "".join(chunk.choices[0].text for chunk in chunks)) == 500
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 0
        assert stdout + stderr == ""


def test_requests_that_outlast_the_grace_period_are_called_off(tiny: Tiny) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        found: list[Future[str]] = []

        def interrupted(url: str) -> str:
            try:
                _, stream = ask(url)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(APIError) as caught:
                list(stream)
            return str(caught.value)

        options = ServeOptions(port=0, grace_seconds=0)
        server.serve(str(tiny("llama")), options, on_ready=lambda url: found.append(pool.submit(interrupted, url)))
        assert "shutting down" in found[0].result()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compress-")]


def test_addresses_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("serve", "anything", "--port", port)
    assert line.startswith(f"error: --port={port}: can't be served at: ")
    assert "--port 0" in line
    assert refused("serve", "anything", "--host", "no such host").startswith("error: --host=no such host: ")
    assert refused("serve", "anything", "--host", "203.0.113.7").startswith("error: --host=203.0.113.7: ")
    assert "65536" in refused("serve", "anything", "--port", "65536")


@pytest.mark.parametrize("content", ["", " \n", "two words", "two\nlines", "schlüssel"])
def test_keys_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    monkeypatch.setattr(server, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    line = refused("serve", "anything", "--port", "0", "--api-key-file", str(path))
    assert line.startswith(f"error: --api-key-file={path}: ")
    assert content.strip() == "" or content not in line
    assert "can't be read" in refused("serve", "anything", "--api-key-file", str(tmp_path / "none"))


def test_no_such_model(tmp_path: Path) -> None:
    assert "--model" in refused("serve", str(tmp_path / "nowhere"), "--port", "0")
    assert "--device" in refused("serve", "anything", "--port", "0", "--device", "gpu")


def test_a_server_for_everyone_says_so(tmp_path: Path) -> None:
    arguments = ["serve", str(tmp_path / "nowhere"), "--port", "0", "--host", "0.0.0.0"]
    (tmp_path / "key").write_text("sk-secret")
    assert CliRunner().invoke(main, arguments).stderr.startswith("warning: everyone who reaches 0.0.0.0 ")
    arguments += ["--api-key-file", str(tmp_path / "key")]
    assert "warning" not in CliRunner().invoke(main, arguments).stderr


def test_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    assert server.default_name(".") == server.default_name(str(tmp_path / "demo/")) == "demo"
    assert server.default_name("org/name") == "org/name"
