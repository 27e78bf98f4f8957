from pathlib import Path

import pytest
import torch
from compress.calibrate import source as module
from compress.calibrate.cache import cache_key, cached, default_cache_dir
from compress.calibrate.errors import InputError
from compress.calibrate.selfgen import SelfText
from compress.calibrate.source import HUB_CHAT, HUB_PLAIN, Model, Request, check_source, choose_source, prepare
from compress.calibrate.text import source_of
from compress.calibrate.windows import calibration_set


@pytest.fixture
def opened(model):
    """The model, and how often it was opened."""
    count = []

    def open_model():
        count.append(1)
        return model

    return Model(open_model, "fingerprint"), count


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(module, "hub_problem", lambda timeout: "https://hub can't be reached (no route)")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(module, "hub_problem", lambda timeout: None)


SMALL = Request(source="self", samples=2, seq_len=32)


def test_auto_without_a_hub_writes_and_says_why(tokenizer, opened, no_hub, tmp_path):
    made = prepare(Request(samples=2, seq_len=32), tokenizer, opened[0], tmp_path)
    assert made.ids.shape == (2, 32)
    assert (
        made.notes[0] == "calibration text: written by the model itself, since https://hub can't be reached (no route)"
    )


def test_auto_with_a_hub_takes_the_usual_dataset(tokenizer, opened, hub, monkeypatch, tmp_path):
    asked = []

    def open_text(spec, *rest):
        asked.append(spec)
        return source_of(spec, ["some words " * 100], "hub")

    monkeypatch.setattr(module, "open_text", open_text)
    made = prepare(Request(samples=2, seq_len=32), tokenizer, opened[0], tmp_path)
    assert asked == [HUB_CHAT]
    assert made.source == HUB_CHAT
    assert "can be reached" in made.notes[0]
    assert opened[1] == []
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert choose_source("auto", tokenizer).source == HUB_PLAIN


def test_auto_falls_back_where_the_hub_fails_later(tokenizer, opened, hub, monkeypatch, tmp_path):
    def open_text(spec, *rest):
        raise InputError("calibration.source", spec, "was cut off")

    monkeypatch.setattr(module, "open_text", open_text)
    made = prepare(Request(samples=2, seq_len=32), tokenizer, opened[0], tmp_path)
    assert made.source == "self"
    assert "was cut off" in made.notes[0]
    with pytest.raises(InputError, match="was cut off"):
        prepare(Request(source="org/name", samples=2, seq_len=32), tokenizer, opened[0], tmp_path)


def test_a_file_is_cut_into_windows(tokenizer, opened, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words and words " * 20)
    made = prepare(Request(source=str(path), samples=2, seq_len=32), tokenizer, opened[0], tmp_path)
    assert made.source == str(path)
    assert opened[1] == []


def test_preflight(tmp_path):
    check_source(Request(source="auto"))
    check_source(Request(source="self"))
    with pytest.raises(InputError, match="no such file"):
        check_source(Request(source=str(tmp_path / "a.txt")))


def test_text_is_written_once(tokenizer, opened, tmp_path):
    first = prepare(SMALL, tokenizer, opened[0], tmp_path)
    again = prepare(SMALL, tokenizer, opened[0], tmp_path)
    assert len(opened[1]) == 1
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest
    assert "kept for the next run" in first.notes[-1]
    assert "read from" in again.notes[-1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    prepare(Request(source="self", samples=2, seq_len=32, seed=1), tokenizer, opened[0], tmp_path)
    assert len(opened[1]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: b"not a safetensors file at all",
    ],
)
def test_a_damaged_entry_is_made_again(tokenizer, opened, tmp_path, damage):
    first = prepare(SMALL, tokenizer, opened[0], tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    again = prepare(SMALL, tokenizer, opened[0], tmp_path)
    assert len(opened[1]) == 2
    assert torch.equal(first.ids, again.ids)
    assert any("damaged" in note for note in again.notes)
    assert "read from" in prepare(SMALL, tokenizer, opened[0], tmp_path).notes[-1]


def test_an_entry_under_a_wrong_name_is_not_believed(tmp_path):
    def make(value):
        return lambda: calibration_set(torch.full((1, 4), value), "self", "here")

    cached("one", make(1), tmp_path)
    (tmp_path / "one.safetensors").rename(tmp_path / "two.safetensors")
    assert cached("two", make(2), tmp_path).ids[0, 0] == 2


def test_a_cache_that_can_not_be_written_costs_a_note(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    made = cached("key", lambda: calibration_set(torch.ones(1, 4), "self", "here"), blocked / "folder")
    assert made.ids.shape == (1, 4)
    assert "not kept" in made.notes[-1]


def test_a_failure_while_storing_leaves_no_litter(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    made = cached("key", lambda: calibration_set(torch.ones(1, 4), "self", "here"), tmp_path)
    assert "No space left" in made.notes[-1]
    assert list(tmp_path.iterdir()) == []


def test_key_counts_everything_that_decides_the_text(tokenizer, monkeypatch):
    keys = {
        cache_key("a", tokenizer, 2, 32, SelfText()),
        cache_key("b", tokenizer, 2, 32, SelfText()),
        cache_key("a", tokenizer, 3, 32, SelfText()),
        cache_key("a", tokenizer, 2, 33, SelfText()),
        cache_key("a", tokenizer, 2, 32, SelfText(seed=1)),
    }
    monkeypatch.setattr(tokenizer, "chat_template", "other")
    keys.add(cache_key("a", tokenizer, 2, 32, SelfText()))
    assert len(keys) == 6
    assert default_cache_dir().name == "calibration"
