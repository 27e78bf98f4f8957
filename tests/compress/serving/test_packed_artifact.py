"""A server over packed weights says what ``generate`` says."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from runs import quick
from servers import NAME, served
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.options import GenerateOptions
from compress.runtime import PackedLinear, generate, load
from compress.serving import Settings, create_app

Tiny = Callable[[str], Path]
LIMIT = 12


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick(tiny("llama"), "rtn", tmp_path_factory.mktemp("served") / "out", text).out


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(artifact)


@pytest.fixture(scope="module")
def packed_client(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[OpenAI]:
    with served(create_app(*loaded, Settings(served_name=NAME))) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_chat_is_that_of_generate(packed_client: OpenAI, artifact: Path, temperature: float) -> None:
    options = GenerateOptions(max_new_tokens=LIMIT, temperature=temperature, seed=5, chat=True)
    expected = "".join(generate(str(artifact), "in a hen", options))
    assert expected
    for _ in range(2):  # the second request finds what the first left
        reply = packed_client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "in a hen"}],
            max_tokens=LIMIT,
            temperature=temperature,
            seed=5,
        )
        assert reply.choices[0].message.content == expected
    chunks = packed_client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "in a hen"}],
        max_tokens=LIMIT,
        temperature=temperature,
        seed=5,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_completions_are_those_of_transformers(
    packed_client: OpenAI, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = loaded
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    ids = tokenizer("the hen", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=LIMIT, do_sample=False)[0, ids.shape[1] :]
    expected = str(tokenizer.decode(made, skip_special_tokens=True))
    asked = {"model": NAME, "prompt": "the hen", "max_tokens": LIMIT, "temperature": 0}
    assert packed_client.completions.create(**asked).choices[0].text == expected  # type: ignore[call-overload]
    chunks = packed_client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
