"""What the real client gets from a real server, held against the model itself."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from openai import OpenAI
from servers import NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TURNS: list[Any] = [{"role": "system", "content": "the hen"}, {"role": "user", "content": "in a hen"}]


def expected_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_chat_uses_the_template_and_counts(
    client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = str(tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True))
    reply = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=9)
    (choice,) = reply.choices
    assert choice.message.content == expected_text(model, tokenizer, prompt, 9)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert reply.object == "chat.completion"
    assert reply.model == NAME
    assert reply.usage is not None
    count = len(tokenizer(prompt).input_ids)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (count, 9, count + 9)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "the hen"}]}, TURNS[1]]
    again = client.chat.completions.create(model=NAME, messages=parts, max_completion_tokens=9)  # type: ignore[arg-type]
    assert again.choices == reply.choices


def test_an_answer_can_be_sent_back_as_a_turn(client: OpenAI) -> None:
    message = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=4).choices[0].message
    turns: list[Any] = [*TURNS, message, {"role": "user", "content": "a"}]
    assert client.chat.completions.create(model=NAME, messages=turns, max_tokens=4).choices[0].message.content
    turns[2] = message.model_dump()
    assert client.chat.completions.create(model=NAME, messages=turns, max_tokens=4).choices[0].message.content


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 4, "n": 2}, {"stop": ["e", "zz"]}])
def test_streamed_chat_is_the_same_text(client: OpenAI, options: dict[str, Any]) -> None:
    asked = {"model": NAME, "messages": TURNS, "max_tokens": 24, "logprobs": True, **options}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        scores = [score for part in own if part.logprobs for score in part.logprobs.content or []]
        assert [score.token for score in scores] == [score.token for score in choice.logprobs.content or []]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 4, "n": 2}])
def test_streamed_completion_is_the_same_text(client: OpenAI, options: dict[str, Any]) -> None:
    asked = {"model": NAME, "prompt": ["in a hen", "the"], "max_tokens": 20, "logprobs": 2, **options}
    whole = client.completions.create(**asked)
    assert len(whole.choices) == 2 * options.get("n", 1)
    chunks = list(client.completions.create(**asked, stream=True))
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert sum(len(part.logprobs.tokens or []) for part in own if part.logprobs) == 20
        assert len(choice.logprobs.token_logprobs or []) == len(choice.logprobs.text_offset or []) == 20


def test_completion_of_text_and_of_tokens(
    client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer("in a hen").input_ids
    reply = client.completions.create(model=NAME, prompt="in a hen")
    assert reply.choices[0].text == expected_text(model, tokenizer, "in a hen", 16)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 16)
    assert client.completions.create(model=NAME, prompt=ids).choices == reply.choices
    both = client.completions.create(model=NAME, prompt=[ids, tokenizer("the").input_ids])
    assert both.choices[0].text == reply.choices[0].text
    assert both.choices[1].text == expected_text(model, tokenizer, "the", 16)


def test_the_stream_is_made_of_server_sent_events(url: str) -> None:
    body = {"model": NAME, "messages": TURNS, "max_tokens": 3, "stream": True}
    reply = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert "usage" not in reply.text


def test_the_end_token_and_stop_strings_end_an_answer(client: OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    ended = client.chat.completions.create(model=NAME, messages=TURNS, logit_bias={"2": 100})
    assert (ended.choices[0].finish_reason, ended.choices[0].message.content) == ("stop", "")
    bias = {str(tokenizer("z").input_ids[0]): 100}  # it says nothing but z
    zs = client.completions.create(model=NAME, prompt="a", stop=["y", "zzz"], max_tokens=9, logit_bias=bias)
    assert (zs.choices[0].finish_reason, zs.choices[0].text) == ("stop", "")
    assert zs.usage is not None
    assert zs.usage.completion_tokens == 3
    never = client.completions.create(model=NAME, prompt="a", stop="zy", max_tokens=4, logit_bias=bias)
    assert (never.choices[0].finish_reason, never.choices[0].text) == ("length", "zzzz")


def test_an_answer_fills_the_context_and_no_more(client: OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    turns: list[Any] = [{"role": "user", "content": "z" * 220}]
    bias = {str(tokenizer("z").input_ids[0]): 100}
    reply = client.chat.completions.create(model=NAME, messages=turns, logit_bias=bias)
    assert reply.usage is not None
    assert (reply.usage.total_tokens, reply.choices[0].finish_reason) == (256, "length")


def test_sampling_is_the_requests_or_that_of_the_model(client: OpenAI, model: PreTrainedModel) -> None:
    def text(**options: Any) -> str:
        return client.completions.create(model=NAME, prompt="the", max_tokens=12, **options).choices[0].text

    greedy = text()
    assert text(temperature=0, seed=1) == greedy == text(seed=2)
    sampled = text(temperature=1, seed=1)
    assert sampled == text(temperature=1, seed=1) != text(temperature=1, seed=2)
    assert text(top_p=0.99, seed=1) != greedy  # asks to sample, at OpenAI's temperature
    assert text(temperature=1, seed=1, extra_body={"top_k": 1}) == greedy
    before = model.generation_config.do_sample, model.generation_config.temperature
    model.generation_config.do_sample, model.generation_config.temperature = True, 1.0
    try:
        assert text(seed=1) == sampled
    finally:
        model.generation_config.do_sample, model.generation_config.temperature = before


def test_logprobs(client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    reply = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=1, logprobs=True, top_logprobs=3)
    assert reply.choices[0].logprobs is not None
    (score,) = reply.choices[0].logprobs.content or []
    prompt = str(tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True))
    with torch.no_grad():
        expected = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1).topk(3)
    assert [top.logprob for top in score.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert score.logprob == score.top_logprobs[0].logprob


def test_models_and_health(client: OpenAI, url: str) -> None:
    assert [found.id for found in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "compress"
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}


def test_requests_at_the_same_time_get_their_own_answers(client: OpenAI) -> None:
    def ask(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model=NAME, messages=TURNS, max_tokens=16, temperature=1, seed=seed, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)

    alone = [ask(seed) for seed in range(8)]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
