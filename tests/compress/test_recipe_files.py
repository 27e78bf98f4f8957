"""Files of recipes that can't be read, and the YAML that they are in."""

import pytest
from recipe_builders import SHIPPED, refusal, write

from compress.recipe import recipe_source
from compress.yaml12 import YamlError, inline, parse

# Files


def test_unknown_recipe_names_the_nearest_and_all():
    text = refusal("rqs")
    assert "did you mean 'rsq'?" in text
    assert all(name in text for name in SHIPPED)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("weights:\n  bits: [3\n", ["not valid YAML", "line 3"]),
        ("weights:\n  bits: 3\n  bits: 4\n", ["line 3", "'bits' is written twice"]),
        ("? [a]\n: 1\n", ["line 1", "plain word"]),
        ("weights: !!python/object:os.system {}\n", ["not valid YAML", "line 1"]),
        ("- rsq\n", ["mapping of sections"]),
        ("", ["mapping of sections"]),
        ("wieghts: {bits: 3}\n", ["no such section", "did you mean 'weights'?"]),
        ("weights: {bist: 3}\n", ["weights.bist", "did you mean 'bits'?"]),
        ("weights: 3\n", ["weights=3", "a mapping of keys to values"]),
        ("3: x\n", ["no such section"]),
        ("base: rqs\n", ["rqs", "did you mean 'rsq'?"]),
        ("base: [rsq]\n", ["base=['rsq']"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "no such file"]),
        ("base: rsq\nname: 3\n", ["name=3", "not text"]),
    ],
)
def test_bad_file_is_refused(content, parts, tmp_path):
    text = refusal(write(tmp_path, "mine.yaml", content))
    assert all(part in text for part in parts), text


def test_missing_folder_and_binary_files_are_refused(tmp_path):
    assert "no such file" in refusal(str(tmp_path / "x.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "no such file" in refusal(str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    assert "not UTF-8" in refusal(str(tmp_path / "binary.yaml")).replace("isn't", "not")
    (tmp_path / "control.yaml").write_bytes(b"a: \x01")
    assert "not valid YAML" in refusal(str(tmp_path / "control.yaml"))


def test_an_inherited_circle_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: c.yaml\n")
    write(tmp_path, "c.yaml", "base: a.yaml\n")
    assert "a -> b -> c -> a" in refusal(str(tmp_path / "a.yaml"))
    own = write(tmp_path, "own.yaml", "base: own.yaml\n")
    assert "own -> own" in refusal(own)


def test_a_misspelt_key_is_found_even_if_an_override_removes_its_section(tmp_path):
    path = write(tmp_path, "mine.yaml", "base: rsq\neval: {task: [piqa]}\n")
    assert "eval.task" in refusal(path, "eval=null")


def test_source_of_a_path_is_the_file(tmp_path):
    assert recipe_source(write(tmp_path, "mine.yaml", "base: rsq  # why\n")) == "base: rsq  # why\n"


# YAML 1.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("012", 12),
        ("12:30", "12:30"),
        ("~", None),
        ("", None),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1e-3",
        "12:30",
        "2026-11-22",
        "",
        "null",
        "a: b # c",
        "two\nlines",
        "é",
        [1, "a"],
        {"a": 1},
        1e-9,
        -1,
        None,
    ],
)
def test_inline_reads_back(value):
    assert "\n" not in inline(value)
    assert parse(inline(value)) == value


def test_yaml_error_without_a_mark_is_still_one_line():
    with pytest.raises(YamlError) as caught:
        parse("a: \x01")
    assert "\n" not in str(caught.value)
