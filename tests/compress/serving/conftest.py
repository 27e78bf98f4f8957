"""A real server in a thread, around a tiny random model, and the real client."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from models import build_model, build_tokenizer
from openai import OpenAI
from servers import NAME, served
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.serving import Settings, create_app


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return build_model("llama", max_position_embeddings=256)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., str]]:
    """``serve(**settings)`` starts a server and gives its URL."""
    with ExitStack() as stack:

        def start(model: PreTrainedModel = model, **settings: Any) -> str:
            app = create_app(model, tokenizer, Settings(served_name=NAME, **settings))
            return stack.enter_context(served(app))

        yield start


@pytest.fixture(scope="module")
def url(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with served(create_app(model, tokenizer, Settings(served_name=NAME))) as url:
        yield url


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


@pytest.fixture
def post(url: str) -> Callable[..., httpx2.Response]:
    """``post(path, **json)`` sends a request without the client's own checks."""

    def send(path: str, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{url}/v1/{path}", json={"model": NAME, **body}, timeout=30)

    return send
