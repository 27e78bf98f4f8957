"""Requests that are refused, each with its reason in the shape that clients understand; the server goes on."""

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from models import build_tokenizer
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from servers import NAME, served
from transformers import PreTrainedModel

from compress.serving import Settings, create_app

TURN = {"role": "user", "content": "a"}
Post = Callable[..., httpx2.Response]


def problem(reply: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error, after a look at its shape."""
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "a"}),
        ("messages", {"messages": None}),
        ("messages.0.role", {"messages": [{"role": "tool", "content": "a"}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("messages.0.name", {"messages": [{**TURN, "name": "bob"}]}),
        ("messages.0.tool_calls", {"messages": [{**TURN, "tool_calls": [{"id": "x"}]}]}),
        ("model", {"model": None}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": "1"}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 17}),
        ("stop", {"stop": 5}),
        ("stop.0", {"stop": [""]}),
        ("seed", {"seed": 2**63}),
        ("logit_bias", {"logit_bias": {"300": 1}}),
        ("logit_bias", {"logit_bias": {"z": 1}}),
        ("logit_bias.5", {"logit_bias": {"5": 101}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.wishes", {"stream": True, "stream_options": {"wishes": 3}}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("frobnicate", {"frobnicate": 1}),
    ],
)
def test_chat_names_what_it_refuses(post: Post, param: str, body: dict[str, Any]) -> None:
    error = problem(post("chat/completions", **{"messages": [TURN], **body}))
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": [300]}),
        ("prompt", {"prompt": ["a"] * 33}),
        ("echo", {"prompt": "a", "echo": True}),
        ("suffix", {"prompt": "a", "suffix": "b"}),
        ("best_of", {"prompt": "a", "best_of": 2}),
        ("logprobs", {"prompt": "a", "logprobs": True}),
        ("messages", {"prompt": "a", "messages": []}),
    ],
)
def test_completion_names_what_it_refuses(post: Post, param: str, body: dict[str, Any]) -> None:
    error = problem(post("completions", **body))
    assert error["param"] == param
    assert param in error["message"]


def test_what_asks_for_nothing_is_accepted(post: Post) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "bob"}
    nulls = dict.fromkeys(("stop", "seed", "top_p", "logprobs", "reasoning_effort", "stream_options", "n"))
    reply = post("chat/completions", messages=[TURN], max_tokens=1, metadata={"a": "b"}, **neutral, **nulls)
    assert reply.status_code == 200, reply.text
    assert post("completions", prompt="a", max_tokens=1, echo=False, best_of=2, n=2).status_code == 200


def test_the_prompt_is_too_long(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="the longest context of this model is 256 tokens") as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "z" * 300}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(BadRequestError, match="at most 156 do") as caught:
        client.completions.create(model=NAME, prompt="z" * 100, max_tokens=157)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    assert client.completions.create(model=NAME, prompt="z" * 255).choices[0].finish_reason == "length"


def test_another_model(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="'tiny'") as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[1]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"model": "\\ud800"}']
)
def test_bodies_that_are_no_request(url: str, post: Post, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    problem(httpx2.post(f"{url}/v1/chat/completions", content=content, headers=headers))
    assert post("completions", prompt="a", max_tokens=1).status_code == 200


def test_a_web_page_cannot_send_a_request(url: str) -> None:
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})
    problem(httpx2.post(f"{url}/v1/completions", content=body, headers={"content-type": "text/plain"}))


def test_a_name_that_was_made_to_mean_this_machine(serve: Callable[..., str]) -> None:
    url = serve(local_only=True)
    for name in ("evil.example", "127.0.0.1.evil.example:80", "", "[x"):
        assert httpx2.get(f"{url}/health", headers={"host": name}).status_code in (400, 403)
    for name in ("localhost:1", "127.0.0.1", "127.9.9.9:5", "[::1]:80"):
        assert httpx2.get(f"{url}/health", headers={"host": name}).status_code == 200


def test_paths_and_methods(url: str) -> None:
    problem(httpx2.get(f"{url}/v1/nothing"), 404)
    problem(httpx2.get(f"{url}/v1/completions"), 405)
    assert httpx2.get(f"{url}/docs").status_code == 404


def test_a_model_without_a_template(model: PreTrainedModel) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with served(create_app(model, tokenizer, Settings(served_name=NAME))) as url:
        body = {"model": NAME, "messages": [TURN]}
        assert problem(httpx2.post(f"{url}/v1/chat/completions", json=body))["code"] == "no_chat_template"
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        assert "roles must alternate" in problem(httpx2.post(f"{url}/v1/chat/completions", json=body))["message"]
        tokenizer.chat_template = "{{ 1 / 0 }}"
        assert "zero" not in problem(httpx2.post(f"{url}/v1/chat/completions", json=body), 500)["message"]
        assert httpx2.get(f"{url}/health").status_code == 200


def test_large_requests(serve: Callable[..., str]) -> None:
    url = serve(max_request_bytes=1000)
    path = f"{url}/v1/completions"
    body = {"model": NAME, "prompt": "z" * 100, "max_tokens": 1}
    assert httpx2.post(path, json=body).status_code == 200
    assert problem(httpx2.post(path, json={**body, "prompt": "z" * 1000}), 413)["code"] == "request_too_large"
    assert problem(httpx2.post(path, json={**body, "prompt": "z" * 5000}), 413)
    headers = {"content-type": "application/json"}
    chunks = iter([b'{"prompt": "', *[b"z" * 100] * 20])
    assert problem(httpx2.post(path, content=chunks, headers=headers), 413)
    assert httpx2.post(path, json=body).status_code == 200


def test_a_body_that_does_not_come(serve: Callable[..., str]) -> None:
    url = serve(body_seconds=0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        assert b" 408 " in connection.recv(1000).splitlines()[0]
    assert httpx2.get(f"{url}/health").status_code == 200


def test_the_key(serve: Callable[..., str]) -> None:
    key = "sk-one-two"
    url = serve(api_key=key)
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    good = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    assert good.completions.create(**body).choices
    for wrong in ("sk-one-twO", "x", key + "x"):
        headers = {"authorization": f"Bearer {wrong}"}
        reply = httpx2.post(f"{url}/v1/completions", json=body, headers=headers)
        assert problem(reply, 401)["code"] == "invalid_api_key"
        assert key not in reply.text
    problem(httpx2.get(f"{url}/v1/models", headers={"authorization": f"Basic {key}"}), 401)
    problem(httpx2.get(f"{url}/openapi.json"), 401)
    problem(httpx2.get(f"{url}/v1/models", headers={"authorization": b"Bearer n\xf6"}), 401)
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{url}/v1", api_key="sk-other", max_retries=0).models.list()
    assert httpx2.get(f"{url}/health").status_code == 200
    assert key not in repr(Settings(api_key=key))


@pytest.mark.parametrize("wrong", [{"max_concurrent": 0}, {"max_queue": -1}, {"served_name": ""}, {"api_key": ""}])
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limits|empty"):
        Settings(**wrong)
