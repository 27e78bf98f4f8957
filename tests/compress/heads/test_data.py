"""Prompts that heads are profiled on: lengths, places, answers of the model itself."""

import pytest
import torch
from compress.calibrate.errors import InputError
from models import CHAT_TEMPLATE, build_model, build_tokenizer

from compress.heads.data import (
    NATO,
    ORDINALS,
    REQUESTS,
    Item,
    answered_items,
    digest,
    passkey_items,
    text_windows,
)

TOKENIZER = build_tokenizer()
PROSE = "The hen went in. It ate an apple.\n" * 9
CODE = "def f(x):\n    return x\n" * 9


def test_passkeys_stand_in_the_text_and_again_behind_their_questions() -> None:
    (item,) = passkey_items(TOKENIZER, [4096], words=4)
    assert len(item.asked) == 10
    ends = [one.answer[1] for one in item.asked]
    assert ends == sorted(ends)
    needles = [one.needle for one in item.asked]
    assert needles != sorted(needles)  # questions come in another order
    for one in item.asked:
        assert item.ids[slice(*one.needle)].equal(item.ids[slice(*one.answer)])
        assert one.needle[1] < item.context <= one.question < one.answer[0]
        before, question = (
            TOKENIZER.decode(item.ids[part])
            for part in (slice(one.needle[0] - 60, one.needle[0]), slice(one.question, one.answer[0]))
        )
        ordinal = ORDINALS[sorted(needles).index(one.needle)]
        assert before.endswith(f"\n\nThe {ordinal} pass phrase to remember is:")
        assert f"is the {ordinal} pass phrase" in question
        assert question.endswith(f"The {ordinal} pass phrase to remember is:")
        words = TOKENIZER.decode(item.ids[slice(*one.needle)]).split()
        assert len(words) == 4
        assert set(words) <= set(NATO.split())
        assert TOKENIZER.decode(item.ids[one.needle[1] :]).startswith(".\n\n")
    places = [start / item.context for start, _ in sorted(needles)]
    assert places[0] < 0.4
    assert places[-1] > 0.6


def test_what_is_supervised_predicts_the_words_and_nothing_else() -> None:
    (item,) = passkey_items(TOKENIZER, [1024], words=4)
    answers = torch.zeros(len(item.ids), dtype=torch.bool)
    for one in item.asked:
        answers[slice(*one.answer)] = True
    assert item.supervised[:-1].equal(answers[1:])
    assert not item.supervised[-1]


@pytest.mark.parametrize("length", [416, 500, 2047, 2048])
def test_items_fill_their_length_in_blocks_of_16(length: int) -> None:
    (item,) = passkey_items(TOKENIZER, [length])
    assert len(item.ids) == length // 16 * 16
    assert 1 <= len(item.asked) <= 10


def test_short_prompts_have_fewer_and_shorter_needles() -> None:
    counts = [len(item.asked) for item in passkey_items(TOKENIZER, [512, 1024, 2048, 4096], words=4)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 10
    tiny, long = passkey_items(TOKENIZER, [512, 4096])
    assert tiny.asked[0].needle[1] - tiny.asked[0].needle[0] < long.asked[0].needle[1] - long.asked[0].needle[0]
    (single,) = passkey_items(TOKENIZER, [4096], words=4, needles=1)
    assert len(single.asked) == 1
    with pytest.raises(InputError, match=r"heads.lengths=64: is too short .* or more"):
        passkey_items(TOKENIZER, [64])


def test_the_least_length_that_an_error_names_is_enough() -> None:
    with pytest.raises(InputError) as caught:
        passkey_items(TOKENIZER, [64])
    least = int(str(caught.value.allowed).split()[0])
    for seed in range(5):
        assert len(passkey_items(TOKENIZER, [least + 32], seed)[0].ids) >= least


def test_haystacks_take_turns_and_begin_anywhere() -> None:
    first, second, third = passkey_items(TOKENIZER, [640] * 3, haystacks=[PROSE, CODE], words=2)
    assert "apple" in TOKENIZER.decode(first.ids)
    assert "return x" in TOKENIZER.decode(second.ids)
    assert "return" not in TOKENIZER.decode(first.ids)
    assert "apple" in TOKENIZER.decode(third.ids)
    starts = [
        TOKENIZER.decode(item.ids[101 : item.asked[0].needle[0]])[:40] for item in passkey_items(TOKENIZER, [2048] * 8)
    ]
    assert len(set(starts)) == 8
    with pytest.raises(InputError, match="no text"):
        passkey_items(TOKENIZER, [640], haystacks=[" \n"])


def test_the_seed_decides_and_the_digest_shows_it() -> None:
    marks = [digest(passkey_items(TOKENIZER, [640], seed)) for seed in (0, 0, 1)]
    assert marks[0] == marks[1] != marks[2]
    (item,) = passkey_items(TOKENIZER, [640])
    changes = (
        Item(item.ids, ~item.supervised, item.kind, item.context),
        Item(item.ids, item.supervised, "answered", item.context),
        Item(item.ids, item.supervised, item.kind, 3),
        Item(item.ids.flip(0), item.supervised, item.kind, item.context),
    )
    assert len({digest([item]), *(digest([change]) for change in changes)}) == 5


@pytest.mark.parametrize("chat", [True, False])
def test_answers_are_what_the_model_says(chat: bool) -> None:
    model, tokenizer = build_model("llama"), build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    items = answered_items(model, tokenizer, [PROSE, "short"], 300, answer=12)
    assert len(items) == 2
    for item in items:
        ids = item.ids
        assert 280 < len(ids) <= 300
        assert item.supervised.nonzero().flatten().tolist() == list(range(item.context - 1, len(ids) - 1))
        with torch.no_grad():
            said = model(ids[None]).logits[0].argmax(-1)
        assert said[item.supervised].equal(ids[item.context :])
        text = tokenizer.decode(ids[: item.context])
        assert any(request in text for request in REQUESTS)
        assert text.endswith("<|im_start|>assistant\n" if chat else "Answer:")
    assert "short" in tokenizer.decode(items[1].ids)
    assert "apple" in tokenizer.decode(items[1].ids)  # goes on with the next text
    with pytest.raises(InputError, match="too few"):
        answered_items(model, tokenizer, [PROSE], 40, answer=12)


def test_an_answer_ends_where_the_model_ends_it() -> None:
    model = build_model("llama")
    model.generation_config.eos_token_id = list(range(300))
    (item,) = answered_items(model, TOKENIZER, [PROSE], 300, answer=12)
    assert len(item.ids) == item.context + 1
    assert item.supervised.sum() == 1


def test_windows_of_text_are_as_long_as_asked_for() -> None:
    windows = text_windows(TOKENIZER, [64, 1000, 64], haystacks=[PROSE])
    assert [len(ids) for ids in windows] == [64, 1000, 64]
    assert "apple" in TOKENIZER.decode(windows[1])
