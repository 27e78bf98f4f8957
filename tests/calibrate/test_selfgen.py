import itertools
import random
import time

import pytest
import torch
from compress.calibrate import selfgen
from compress.calibrate.decoding import Filter, Writer, cache_for, write
from compress.calibrate.openings import KINDS, REQUESTS, opening, request
from compress.calibrate.selfgen import SelfText, fast_dtype, self_generated
from compress.calibrate.workers import Workers

SMALL = SelfText(chunk=24)


def test_shape_and_vocabulary(model, tokenizer):
    made = self_generated(model, tokenizer, 3, 40, SMALL)
    assert made.ids.shape == (3, 40)
    assert made.source == "self"
    assert int(made.ids.max()) < len(tokenizer) < model.config.vocab_size


def test_seed_decides_and_the_global_generator_is_left_alone(model, tokenizer):
    states = torch.get_rng_state(), random.getstate()
    one = self_generated(model, tokenizer, 2, 48, SMALL)
    assert one.digest == self_generated(model, tokenizer, 2, 48, SMALL).digest
    assert one.digest != self_generated(model, tokenizer, 2, 48, SelfText(seed=1, chunk=24)).digest
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_batch_and_memory_do_not_change_the_text(model, tokenizer, monkeypatch):
    whole = self_generated(model, tokenizer, 4, 48, SMALL)
    assert torch.equal(whole.ids, self_generated(model, tokenizer, 4, 48, SelfText(chunk=24, batch=3)).ids)
    batches = []
    monkeypatch.setattr(selfgen, "CACHE_BYTES", 2 * selfgen._cache_bytes(model, 24))
    monkeypatch.setattr(selfgen, "write", lambda m, w, *rest: batches.append(len(w)) or write(m, w, *rest))
    assert torch.equal(whole.ids, self_generated(model, tokenizer, 4, 48, SMALL).ids)
    assert batches == [2, 2, 2, 2]


def test_progress_reaches_the_end(model, tokenizer):
    told = []
    self_generated(model, tokenizer, 2, 48, SMALL, lambda done, total: told.append((done, total)))
    assert all(total == 96 for _, total in told)
    assert told[-1][0] >= 92
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_threads_count_together_and_progress_never_goes_back(model, tokenizer, monkeypatch):
    told, inside = [], []

    def write_quickly(model, writers, uniforms, choice, banned, step_done):
        for _ in range(uniforms.shape[1]):
            step_done(len(writers))
        return torch.zeros(uniforms.shape, dtype=torch.int64)

    def progress(done, total):
        inside.append(done)
        time.sleep(1e-4)  # room for another thread
        assert inside == [done]
        inside.clear()
        told.append(done)

    monkeypatch.setattr(selfgen, "write", write_quickly)
    monkeypatch.setattr(selfgen, "Workers", lambda count: Workers(4))
    self_generated(model, tokenizer, 8, 48, SelfText(chunk=24, batch=2), progress)
    assert told == list(range(2, 8 * 48 + 1, 2))


def test_requests_are_a_share_of_the_sequences(model, tokenizer, monkeypatch):
    start = tokenizer.bos_token_id

    def chats(share):
        made = self_generated(model, tokenizer, 8, 24, SelfText(chunk=24, chat_share=share))
        return [bool(row[0] == start) for row in made.ids]

    assert chats(0.25) == [False, False, False, True] * 2
    assert not any(chats(0.0))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert not any(chats(1.0))


def test_sampled_tokens_are_what_the_model_gives_without_a_cache(model):
    """Greedy writing with the cache equals a full forward pass a token, from ragged openings."""
    length, greedy = 12, Filter(top_k=1)
    openings = [[5, 9, 3], [7]]
    writers = [Writer(itertools.chain([start]), frozenset()) for start in openings]
    none = torch.empty(0, dtype=torch.int64)
    made = write(model, writers, torch.zeros(2, length), greedy, none, lambda tokens: None)
    for start, row in zip(openings, made, strict=True):
        expected = list(start)
        while len(expected) < length:
            with torch.no_grad():
                expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
        assert row.tolist() == expected


def test_cache_storage_is_made_once(model):
    cache = cache_for(model, 6)
    with torch.no_grad():
        for token in range(6):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            if token == 0:
                address = cache.layers[0].keys.data_ptr()
    assert cache.layers[0].keys.data_ptr() == address
    assert cache.get_seq_length() == 6


def test_writer_opens_a_new_document_at_its_end():
    writer = Writer(iter([[1, 2], [3, 4], [5]]), ends=frozenset({0}))
    assert [writer.follow(drawn) for drawn in (-1, 0, 10, 0, 99, 11, 12, 0, 14)] == [1, 2, 10, 3, 4, 11, 12, 5, 14]


PROBABILITIES = torch.tensor([[0.5, 0.12, 0.0, 0.3, 0.08]])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Filter(), [0.5, 0.12, 0.0, 0.3, 0.08]),
        (Filter(top_k=2), [0.625, 0, 0, 0.375, 0]),
        (Filter(top_p=0.79), [0.625, 0, 0, 0.375, 0]),
        (Filter(top_p=0.81, top_k=5), [0.5 / 0.92, 0.12 / 0.92, 0, 0.3 / 0.92, 0]),
        (Filter(min_p=0.25), [0.625, 0, 0, 0.375, 0]),
        (Filter(temperature=0.5), [0.25 / 0.3608, 0.0144 / 0.3608, 0, 0.09 / 0.3608, 0.0064 / 0.3608]),
        (Filter(top_k=1), [1, 0, 0, 0, 0]),
    ],
)
def test_filters_draw_with_the_right_frequencies(choice, expected):
    uniform = (torch.arange(2000) + 0.5) / 2000
    drawn = choice.draw(PROBABILITIES.log().expand(2000, -1), uniform)
    found = torch.bincount(drawn, minlength=5) / 2000
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=2e-3, rtol=0)


def test_a_uniform_at_either_end_never_draws_an_impossible_token():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(2, -1)
    drawn = Filter().draw(logits, torch.tensor([0.0, 1.0 - 2**-24]))
    assert drawn.tolist() == [1, 2]


def test_openings_are_varied_and_fully_filled_in():
    rng = random.Random(0)
    made = {opening(rng) for _ in range(400)} | {request(rng) for _ in range(200)}
    assert len(made) > 400
    assert not any("{" in text for text in made)
    assert sum(map(len, KINDS.values())) + len(REQUESTS) > 40


def test_fast_dtype_is_a_float_type():
    assert fast_dtype() in (torch.bfloat16, torch.float32)
    assert fast_dtype("cuda") is torch.bfloat16
