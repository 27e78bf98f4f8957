"""More requests than workers, clients that go away, failures, and the end of a server."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from models import build_model, build_tokenizer
from openai import APIError, InternalServerError, OpenAI
from servers import NAME, served
from transformers import PreTrainedModel

from compress.serving import Settings, create_app

LONG = {"model": NAME, "prompt": "a", "max_tokens": 200, "logit_bias": {"100": 100}}
SHORT = {"model": NAME, "prompt": "a", "max_tokens": 1}


class Steps:
    """A model whose every step is counted, and takes a while or fails if told to."""

    def __init__(self) -> None:
        self.model: PreTrainedModel = build_model("llama", max_position_embeddings=256)
        self.model.register_forward_pre_hook(self._step)
        self.count, self.seconds, self.fails = 0, 0.01, False

    def _step(self, *_: object) -> None:
        self.count += 1
        if self.fails:
            raise RuntimeError("no memory left")
        time.sleep(self.seconds)

    def settled(self) -> bool:
        """Whether nothing is generated any more."""
        before = self.count
        time.sleep(10 * self.seconds + 0.1)
        return self.count == before


@pytest.fixture
def steps() -> Steps:
    return Steps()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connected(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(serve: Callable[..., str], steps: Steps, stream: bool) -> None:
    url = serve(steps.model, max_concurrent=1)
    if stream:
        with httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as reply:
            next(reply.iter_text())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/completions", json=LONG, timeout=0.5)
    until(steps.settled)
    assert 0 < steps.count < 150
    assert connected(url).completions.create(**SHORT).choices


def test_a_client_that_goes_away_while_it_waits(serve: Callable[..., str], steps: Steps) -> None:
    url = serve(steps.model, max_concurrent=1)
    with httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as first:
        next(first.iter_text())
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/completions", json=LONG, timeout=0.2)
    until(steps.settled)
    assert steps.count < 150  # the second never began


def test_a_full_line(serve: Callable[..., str], steps: Steps) -> None:
    url = serve(steps.model, max_concurrent=1, max_queue=1)
    chat = {**LONG, "messages": [{"role": "user", "content": "a"}], "stream": True}
    del chat["prompt"]
    with ExitStack() as stack:
        path = f"{url}/v1/chat/completions"
        streams = [stack.enter_context(httpx2.stream("POST", path, json=chat)).iter_lines() for _ in range(2)]
        assert all("assistant" in next(lines) for lines in streams)  # both have a place, to run or to wait
        reply = httpx2.post(f"{url}/v1/completions", json=SHORT)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) > 0
        assert httpx2.get(f"{url}/health").status_code == 200
    patient = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=3)
    assert patient.completions.create(**SHORT).choices


def test_as_many_run_at_once_as_may(serve: Callable[..., str], steps: Steps) -> None:
    url = serve(steps.model, max_concurrent=2)
    steps.seconds = 0.02

    def first_words(_: int) -> tuple[float, float]:
        begun: list[float] = []
        with httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 20, "stream": True}) as reply:
            begun.extend(time.monotonic() for line in reply.iter_lines() if line)
        return begun[0], begun[-1]

    with ThreadPoolExecutor(3) as pool:
        spans = sorted(pool.map(first_words, range(3)))
    assert spans[1][0] < spans[0][1]  # the second began before the first had ended
    assert spans[2][0] >= min(spans[0][1], spans[1][1]) - 0.02  # the third after one had


def test_a_failure_is_one_requests_failure(
    serve: Callable[..., str], steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    client = connected(serve(steps.model))
    steps.fails = True
    with pytest.raises(InternalServerError) as caught:
        client.completions.create(**SHORT)
    assert "no memory left" not in str(caught.value)
    assert "no memory left" in caplog.text
    with pytest.raises(APIError, match="failed on this request"):
        list(client.completions.create(**SHORT, stream=True))
    steps.fails = False
    assert client.completions.create(**SHORT).choices


def test_a_server_that_ends_calls_off_what_runs(steps: Steps) -> None:
    app = create_app(steps.model, build_tokenizer(), Settings(served_name=NAME))
    with served(app) as url, ThreadPoolExecutor(2) as pool:

        def streamed() -> list[Any]:
            return list(connected(url).completions.create(**LONG, stream=True))

        whole = pool.submit(httpx2.post, f"{url}/v1/completions", json=LONG, timeout=30)
        stream = pool.submit(streamed)
        until(lambda: steps.count > 5)
        app.state.engine.cancel()
        assert whole.result().status_code == 503
        with pytest.raises(APIError, match="shutting down"):
            stream.result()
        assert httpx2.post(f"{url}/v1/completions", json=SHORT).status_code == 503
    assert steps.count < 150
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("compress-serve", "compress-prep"))
    ]
