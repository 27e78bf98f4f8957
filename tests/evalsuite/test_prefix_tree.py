import random

import pytest
import torch
from compress.evalsuite.prefix_tree import ROW_TOKENS, Continuation, plan_rows, probe
from scoring_builders import questions


def planned(items, per_row=8):
    return [(family.prefix, list(family.rows)) for family in plan_rows(items, per_row)]


LONG_START = tuple(range(200))
TEXT = tuple(random.Random(1).choices(range(300), k=900))
SHAPES = {
    "questions": questions(20, (3, 30), 4),
    "one token each": questions(20, (3, 30), 4, (1, 1)),
    "shared examples": questions(40, (3, 30), 4, start=LONG_START),
    "long texts": questions(3, (1500, 1600), 3),
    "whole texts": [Continuation(TEXT[i : i + 700], 699) for i in range(5)],
    "same twice": [Continuation(TEXT[:9], 2), Continuation(TEXT[:9], 2), Continuation(TEXT[:9], 3)],
    "one within another": [Continuation(TEXT[:length], 2) for length in (4, 9, 20)],
    "many answers": questions(1, (100, 100), 700, (4, 8)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_sequence_can_be_read_off_its_row(name):
    items = SHAPES[name]
    seen = []
    for prefix, rows in planned(items):
        for row in rows:
            for member, path in zip(row.members, row.paths, strict=True):
                inputs = items[member].inputs
                assert prefix + tuple(row.tokens[place] for place in path) == inputs
                assert [row.positions[place] for place in path] == list(range(len(prefix), len(inputs)))
                assert len(path) >= items[member].scored
                seen.append(member)
    assert sorted(seen) == list(range(len(items)))


@pytest.mark.parametrize("window", [None, 5])
def test_a_token_sees_its_own_past_and_nothing_else(window):
    for prefix, rows in planned(SHAPES["shared examples"]) + planned(SHAPES["questions"]):
        for row in rows:
            mask = row.mask(len(prefix), window)
            for path in row.paths:
                whole = [*range(len(prefix)), *(len(prefix) + place for place in path)]
                for position, place in enumerate(path, start=len(prefix)):
                    first = 0 if window is None else max(0, position + 1 - window)
                    expected = torch.zeros(mask.shape[1], dtype=torch.bool)
                    expected[whole[first : position + 1]] = True
                    assert torch.equal(mask[place], expected)


def test_a_question_is_written_once():
    ((prefix, rows),) = planned(SHAPES["questions"])
    assert prefix == ()
    contexts = {item.tokens[: item.context] for item in SHAPES["questions"]}
    answers = sum(item.scored - 1 for item in SHAPES["questions"])
    assert sum(len(row.tokens) for row in rows) <= sum(map(len, contexts)) + answers
    assert len(rows) == 3  # 20 questions, 8 a row


def test_one_token_answers_cost_nothing():
    items = SHAPES["one token each"]
    ((_, rows),) = planned(items)
    assert sum(len(row.tokens) for row in rows) <= sum(map(len, {item.inputs for item in items}))


def test_what_many_rows_begin_with_is_a_prefix():
    ((prefix, rows),) = planned(SHAPES["shared examples"])
    assert prefix == LONG_START
    assert len(rows) == 5
    few = questions(2, (3, 30), 4, start=LONG_START)
    ((prefix, rows),) = planned(few)  # in one row there is nothing to save
    assert prefix == ()
    assert len(rows) == 1


def test_a_long_text_is_its_own_prefix():
    families = planned(SHAPES["long texts"])
    assert len(families) == 3
    assert all(len(prefix) >= 1499 and len(rows) == 1 for prefix, rows in families)


def test_prefixes_of_several_kinds_and_questions_without():
    other = tuple(range(299, 99, -1))
    mixed = questions(30, (3, 9), 2, start=LONG_START) + questions(30, (3, 9), 2, start=other) + questions(9, (3, 9), 2)
    prefixes = sorted(prefix for prefix, _ in planned(mixed))
    assert [prefix for prefix in prefixes if prefix] == [LONG_START, other]
    assert sum(len(row.members) for _, rows in planned(mixed) for row in rows) == len(mixed)


def test_rows_are_closed_in_time():
    ((_, rows),) = planned(questions(100, (20, 60), 4), per_row=1000)
    assert len(rows) > 1
    for row in rows[:-1]:
        assert ROW_TOKENS <= len(row.tokens) < ROW_TOKENS + 100
    ((_, rows),) = planned(SHAPES["whole texts"])
    assert [len(row.members) for row in rows] == [1] * 5
    families = planned(SHAPES["many answers"])
    assert max(len(row.tokens) for _, rows in families for row in rows) <= 4 * ROW_TOKENS + 8


def test_plain_sequences_need_no_mask():
    for name, plain in (("whole texts", True), ("one within another", True), ("questions", False)):
        assert all(row.branches is not plain for _, rows in planned(SHAPES[name]) for row in rows)


def test_the_probe_uses_everything():
    items = SHAPES["questions"]
    (_, longest), family = probe(items)
    (row,) = family.rows
    assert longest.tokens == max((item.tokens for item in items), key=len)
    assert len(family.prefix) > 0
    assert row.branches
    assert family.prefix + tuple(row.tokens[place] for place in row.paths[1]) == longest.inputs
