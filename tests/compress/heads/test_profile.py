"""Profiles of heads: written, read, refused, drawn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from models import build_model, build_tokenizer
from runs import refused

from compress.fingerprint import fingerprint_of
from compress.heads.profile import FILE, HeadProfile, profile, read_profile
from compress.heads.profile_page import profile_page
from compress.heads.scores import ScoreSettings

LLAMA = build_model("llama")
VALUES = torch.tensor([[0.0, 0.25], [1.0, 0.5], [0.99, 0.125]])


def made() -> HeadProfile:
    empty = HeadProfile(fingerprint_of(LLAMA.config), items="ab" * 32, lengths=(1024,), seed=7)
    return empty.with_score("echo", VALUES, 1.5).with_score("distant", VALUES.flip(0), 2.0, observed=64)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = made().save(tmp_path)
    assert path == tmp_path / FILE
    assert read_profile(path) == read_profile(tmp_path) == made()
    assert made().settings == {"distant": {"observed": 64}}
    assert torch.tensor(read_profile(path).scores["echo"]).equal(VALUES)


def test_scores_of_a_model_with_their_time_and_settings() -> None:
    settings = ScoreSettings(lengths=(448,), words=2, random_tokens=96)
    found = profile(LLAMA, build_tokenizer(), ("echo", "mean_qk"), settings)
    assert list(found.scores) == ["echo", "mean_qk"] == list(found.seconds)
    assert found.settings["copies"] == 4
    assert found.lengths == (448,)
    assert HeadProfile.from_json(json.loads(json.dumps(found.to_json()))) == found
    other = profile(LLAMA, build_tokenizer(), (), ScoreSettings(lengths=(448,), words=2, seed=1))
    assert found.items != other.items


def test_another_model_is_refused_with_both_fingerprints() -> None:
    made().check(LLAMA.config)
    other = build_model("qwen3").config
    with pytest.raises(InputError) as caught:
        made().check(other)
    for config in (LLAMA.config, other):
        assert fingerprint_of(config).config_hash[:12] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version 2; allowed: version 1"),
        ({"scorse": {}}, "did you mean 'scores'"),
        ({"scores": {"echo": [[1.0, 2.0]]}}, "echo isn't one figure for each of 3 x 2 heads"),
        ({"scores": {"echo": [["x", 2.0]] * 3}}, "scores.echo.0.0"),
        ({"scores": {"echo": [[float("nan"), 2.0]] * 3}}, "finite"),
        ({"scores": None}, "scores"),
        ({"fingerprint": {}}, "fingerprint"),
    ],
)
def test_what_is_no_profile_of_this_version_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(made().to_json() | change))
    line = refused("heads", str(path))
    assert told in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("content", "told"), [("{", "isn't JSON"), ("[]", "isn't a profile"), ("{}", "isn't a profile")]
)
def test_other_files_are_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    assert told in refused("heads", str(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert "isn't JSON" in refused("heads", str(path))
    assert "there is no such file" in refused("heads", str(tmp_path / "none.json"))
    assert f"has no {FILE}" in refused("heads", str(tmp_path))


def test_the_chart_has_a_digit_for_every_head() -> None:
    lines = made().lines()
    chart = [line.split()[2:] for line in lines if line.startswith("  layer")]
    assert chart == [[".", "2"], ["9", "5"], ["9", "1"]]
    assert any(line.startswith("largest   1.0 1, 2.0 0.99") for line in lines)
    assert lines[-1] == "agreement of echo's 1 largest with those of other scores: distant 1"
    level = HeadProfile(fingerprint_of(LLAMA.config)).with_score("echo", torch.ones(3, 2), 0).lines()
    assert [line.split()[2:] for line in level if line.startswith("  layer")] == [[".", "."]] * 3


def test_the_command_prints_draws_and_chooses(tmp_path: Path) -> None:
    made().save(tmp_path)
    run = CliRunner().invoke(main, ["heads", str(tmp_path), "--score", "distant", "--html", str(tmp_path / "h.html")])
    assert run.exit_code == 0, run.output
    assert "distant: a line a layer" in run.output
    page = (tmp_path / "h.html").read_text()
    assert page.count("layer 1, head 0: 1<") == 4  # two scores, two widths
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    told = CliRunner().invoke(main, ["heads", str(tmp_path), "--json"])
    assert json.loads(told.output) == made().to_json()
    line = refused("heads", str(tmp_path), "--score", "eco")
    assert "did you mean 'echo'" in line
    assert "echo, distant" in line


def test_a_profile_without_scores_says_so(tmp_path: Path) -> None:
    HeadProfile(fingerprint_of(LLAMA.config)).save(tmp_path)
    assert "the profile is empty" in refused("heads", str(tmp_path))


def test_text_of_a_file_is_escaped_on_the_page() -> None:
    page = profile_page(made().with_score("<b>x</b>", VALUES, 1), "<i>model</i>")
    assert "<b>x" not in page
    assert "<i>model" not in page
