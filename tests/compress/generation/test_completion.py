"""Answers of a tiny model, held against transformers' own ``generate``."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from models import build_model, build_tokenizer
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compress.generation import Piece, Sampling, Task, complete


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model("llama")


@pytest.fixture(scope="module")
def task(tokenizer: PreTrainedTokenizerBase) -> Task:
    return Task(tuple(tokenizer("in a hen").input_ids), 12)


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[list[Piece]]:
    """Pieces of every answer; each ends with the only one that says why."""
    found: list[Piece] = []
    complete(model, tokenizer, task, found.append)
    answers = [[piece for piece in found if piece.index == index] for index in range(task.answers)]
    for answer in answers:
        assert [bool(piece.finish) for piece in answer] == [False] * (len(answer) - 1) + [True]
    return answers


def text(answer: list[Piece]) -> str:
    return "".join(piece.text for piece in answer)


def test_greedy_is_that_of_transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    ids = torch.tensor([task.prompt])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    (answer,) = run(model, tokenizer, task)
    assert text(answer) == tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer[-1].tokens, answer[-1].finish) == (12, "length")


def test_the_end_token_ends_an_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    ((*_, whole),) = run(model, tokenizer, replace(task, sampling=Sampling(logit_bias=((2, 100.0),))))
    assert (whole.tokens, whole.finish, whole.text) == (1, "stop", "")


def test_sampling_follows_the_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([task.prompt])).logits[0, -1] / 0.5
    values, ids = logits.topk(3)
    expected = dict(zip(ids.tolist(), values.softmax(-1).tolist(), strict=True))
    sampling = Sampling(temperature=0.5, top_k=3, seed=1)
    drawn = Counter(
        answer[-1].scores[0].chosen.logprob
        for answer in run(model, tokenizer, replace(task, max_new_tokens=1, answers=600, sampling=sampling, logprobs=0))
        if answer[-1].scores
    )
    plain = (logits * 0.5).log_softmax(-1)
    for token, share in expected.items():
        near = sum(count for value, count in drawn.items() if math.isclose(value, float(plain[token]), abs_tol=1e-4))
        assert abs(near / 600 - share) < 0.08


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.999),  # more tokens than are looked at first
        Sampling(temperature=2.0, top_k=40, top_p=0.9, min_p=0.02),
        Sampling(temperature=0.5, top_k=1000, top_p=1e-6),
    ],
)
def test_the_filters_are_those_of_transformers(sampling: Sampling) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    if sampling.top_k:
        warpers.insert(1, TopKLogitsWarper(sampling.top_k))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
    ids, probabilities = sampling.candidates(logits)
    found = torch.zeros(1000).scatter(0, ids, probabilities / probabilities.sum())
    torch.testing.assert_close(found, expected)


def test_a_seed_decides_the_text_whatever_runs_beside(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    tasks = [replace(task, sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed)) for seed in (1, 2, 3, 1)]
    alone = [text(run(model, tokenizer, one)[0]) for one in tasks]
    assert alone[0] == alone[3]
    assert len(set(alone)) == 3
    state = torch.random.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: text(run(model, tokenizer, one)[0]), tasks))
    assert together == alone
    assert torch.equal(state, torch.random.get_rng_state())
    several = run(model, tokenizer, replace(tasks[0], answers=3))
    assert text(several[0]) == alone[0]
    assert len({text(answer) for answer in several}) == 3
    unseeded = {text(run(model, tokenizer, replace(task, sampling=Sampling(temperature=1.0)))[0]) for _ in range(3)}
    assert len(unseeded) > 1


def test_presence_and_frequency_penalties(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    token = tokenizer("z").input_ids[0]
    bias = ((token, 30.0),)
    long = replace(task, max_new_tokens=6)
    assert text(run(model, tokenizer, replace(long, sampling=Sampling(logit_bias=bias)))[0]) == "z" * 6
    frequent = Sampling(logit_bias=bias, frequency_penalty=10.0)
    counted = text(run(model, tokenizer, replace(long, sampling=frequent))[0]).count("z")
    assert 2 <= counted < 6  # each takes another 10 off the advantage of 30
    present = Sampling(logit_bias=bias, presence_penalty=60.0)
    assert text(run(model, tokenizer, replace(long, sampling=present))[0]).count("z") == 1


def test_logprobs_are_the_models(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    asked = replace(task, sampling=Sampling(temperature=2.0, seed=5), logprobs=2)
    scores = [score for piece in run(model, tokenizer, asked)[0] for score in piece.scores]
    assert len(scores) == 12
    with torch.no_grad():
        expected = model(torch.tensor([task.prompt])).logits[0, -1].log_softmax(-1)
    assert [top.logprob for top in scores[0].top] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)
    assert float((expected - scores[0].chosen.logprob).abs().min()) < 1e-4
    assert [score.offset for score in scores] == sorted(score.offset for score in scores)


def test_logprobs_end_where_a_stop_string_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    sampling = Sampling(logit_bias=((tokenizer("z").input_ids[0], 100.0),))
    asked = replace(task, stop=("zz",), logprobs=0, sampling=sampling)
    (answer,) = run(model, tokenizer, asked)
    assert (text(answer), answer[-1].finish, answer[-1].tokens) == ("", "stop", 2)
    assert not any(piece.scores for piece in answer)


def test_cancelling_ends_at_the_token_in_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 3

    found: list[Piece] = []
    complete(model, tokenizer, replace(task, max_new_tokens=400), found.append, cancelled)
    assert len(asked) == 4
    assert not any(piece.finish for piece in found)


def test_the_models_config_stays_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> None:
    before = model.generation_config.to_dict()
    run(model, tokenizer, replace(task, sampling=Sampling(temperature=1.0, repetition_penalty=1.3)))
    assert model.generation_config.to_dict() == before
