"""Text of tokens as they come."""

from collections.abc import Sequence

import pytest
from models import build_tokenizer
from transformers import PreTrainedTokenizerBase

from compress.generation import TextStream

TEXTS = ["in a hen", "naïve café – “quoted” 日本語 🦔🦔", "", " leading and trailing ", "a\n\nb\tc"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the hen"])
def test_pieces_joined_are_the_text_and_hold_whole_characters(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: str
) -> None:
    stream = TextStream(tokenizer, tokenizer(prompt).input_ids)
    found = pieces(stream, tokenizer(text).input_ids)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)
    assert stream.released == stream.decoded == len(text)


def test_text_comes_with_the_token_that_completes_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    assert pieces(TextStream(tokenizer, ()), tokenizer("aé🦔b").input_ids) == ["a", "", "é", "", "", "", "🦔", "b", ""]


def test_bytes_that_are_no_character_are_shown_as_such(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("éa").input_ids
    half = [ids[0], ids[0], ids[2], ids[0]]
    assert "".join(pieces(TextStream(tokenizer, ()), half)) == tokenizer.decode(half) == "\ufffd\ufffda\ufffd"


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer("a").input_ids, 1, *tokenizer("b").input_ids, 2]
    assert "".join(pieces(TextStream(tokenizer, ()), ids)) == "ab"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("zzz",), "one the two the three"),
        (("the",), "one "),  # a single token, and part of one: " the"
        (("e two t",), "one th"),  # begins and ends within tokens
        (("three", "two"), "one the "),  # the first in the text, not in the list
        (("two the", "the two"), "one "),  # overlapping
        (("threex",), "one the two the three"),  # begun at the end and never completed
        (("o",), ""),
    ],
)
def test_stop_strings(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], expected: str) -> None:
    stream = TextStream(tokenizer, (), stop)
    found = pieces(stream, tokenizer("one the two the three").input_ids)
    assert "".join(found) == expected
    assert stream.stopped == (expected != "one the two the three")
    assert stream.released == len(expected)


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, (), ("abcd",))
    assert [stream.push(token) for token in tokenizer("xababce").input_ids] == ["x", "", "", "ab", "", "", "abce"][:7]


def test_the_prompt_is_no_part_of_a_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, tokenizer("a").input_ids, ("ab",))
    assert "".join(pieces(stream, tokenizer("b").input_ids)) == "b"
