"""Local paths, names of users and tokens don't leave this machine; everything else does."""

from pathlib import Path
from typing import Any

import pytest

from compress.artifact.privacy import Cleaner, shareable


def report(**sections: Any) -> dict[str, Any]:
    """The parts of a report that name places."""
    base: dict[str, Any] = {
        "model": {"source": "/data/jane doe/models/base model", "hub_id": None},
        "recipe": {
            "calibration": {"source": "../clients/acme text.jsonl"},
            "eval": {"text": "Salesforce/wikitext:wikitext-2-raw-v1:test:text", "task_path": "/data/jane doe/tasks"},
        },
        "calibration": {"source": "../clients/acme text.jsonl"},
        "command": "compress.run()",
    }
    return base | sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 documents of /srv/work/clients/acme text.jsonl", "3 documents of acme text.jsonl"),
        ("calibration text: ../clients/acme text.jsonl, as asked", "calibration text: acme text.jsonl, as asked"),
        ("/data/jane doe/models/base model", "base model"),
        ("see /data/jane doe/notes.md", "see notes.md"),
        ("/home/jane/x/y.gguf and /Users/Jane/z.txt", "y.gguf and z.txt"),
        ("/home/jane", "~"),
        (r"C:\Users\jane\corpora\x.txt, read", "x.txt, read"),
        ("'/var/lib/data/x.parquet'", "'x.parquet'"),
        (f"{Path.home()}/secret/x", "x"),
        (f"{Path.cwd()}/sub/x", "x"),
        ("token hf_abcdefghijklmnopqrstuvwxyz012345", "token hf_***"),
        ("", ""),
    ],
)
def test_what_is_taken_out(text: str, expected: str) -> None:
    assert Cleaner(report()).text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
        "https://huggingface.co/org/model/blob/main/LICENSE",
        "12 tokens/s, 3/4 of all, and/or",
        r"| a\|b | c |",
        r"model\.layers\.1\.mlp",
        r"\.mlp\.down_proj$",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "compress.report/1",
        "Hadamard 12x8 (Paley I)",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_what_stays(text: str) -> None:
    assert Cleaner(report()).text(text) == text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("compress run --model org/m --recipe rsq", "compress run --model org/m --recipe rsq"),
        ("compress run --model models/private/m --recipe ./r/my.yaml", "compress run --model m --recipe my.yaml"),
        ("compress run --out=out/x/y", "compress run --out=y"),
        ("compress run --set 'calibration.source=/a/b c/d e.txt'", "compress run --set 'calibration.source=d e.txt'"),
        (
            "compress run --set eval.text=Salesforce/wikitext:wikitext-2-raw-v1:test:text",
            "compress run --set eval.text=Salesforce/wikitext:wikitext-2-raw-v1:test:text",
        ),
        ("compress run --push jane/m --public", "compress run --push jane/m --public"),
        ("compress run --set 'weights.overrides={\"a/b\": 8}'", "compress run --set 'weights.overrides={\"a/b\": 8}'"),
        ("compress run --task-path ~/x/tasks/ --eval a,b", "compress run --task-path tasks --eval a,b"),
        ("compress.run()", "compress.run()"),
        ("an 'open quote /home/jane/x", "an 'open quote x"),
    ],
)
def test_commands(command: str, expected: str) -> None:
    model = {"source": "org/m", "hub_id": "org/m"}
    found = shareable(report(command=command, model=model))["command"]
    assert found == expected


def test_a_report_is_cleaned_everywhere_and_not_changed() -> None:
    nested = {"/data/jane doe/tasks/x.yaml": [{"file": "/data/jane doe/tasks/x.jsonl", "n": 3}, None, True, 0.5]}
    original = report(nested=nested)
    clean = shareable(original)
    assert clean["nested"] == {"tasks/x.yaml": [{"file": "tasks/x.jsonl", "n": 3}, None, True, 0.5]}
    assert clean["model"] == {"source": "base model", "hub_id": None}
    assert clean["recipe"]["eval"]["task_path"] == "tasks"
    assert original == report(nested=nested)
    assert shareable(clean) == clean


def test_without_calibration_and_scores() -> None:
    bare = {
        "model": {"source": "org/m", "hub_id": "org/m"},
        "recipe": {},
        "calibration": None,
        "command": "compress.run()",
    }
    assert shareable(bare) == bare
