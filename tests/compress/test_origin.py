"""Where a model comes from and its licence: what is stated, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import save_tiny_gguf

from compress.model import open_model
from compress.origin import Origin, legal_files, origin_of

Tiny = Callable[[str], Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama"), tmp_path / "m")


def origin(path: Path) -> Origin:
    return origin_of(open_model(str(path)))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("license: mit", Origin(license="mit")),
        ("license: [mit, apache-2.0]", Origin(license=["mit", "apache-2.0"])),
        ("license: [mit", Origin()),
        ("license: 7", Origin()),
        ("language: [en, fr, 3, English]", Origin(languages=("en", "fr"))),
        ("language: de", Origin(languages=("de",))),
        ("base_model: org/parent", Origin()),  # the parent of this model, not this model
        (
            "license: other\nlicense_name: llama3\nlicense_link: https://x.y/z",
            Origin(license="other", license_name="llama3", license_link="https://x.y/z"),
        ),
        ("license: other\nlicense_name: n\nlicense_link: LICENSE", Origin(license="other", license_name="n")),
        ("license: My Own Licence", Origin(license="other", license_name="My Own Licence")),
    ],
)
def test_what_a_readme_says(folder: Path, header: str, expected: Origin) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n# M\n")
    assert origin(folder) == expected


def test_no_readme(folder: Path) -> None:
    assert origin(folder) == Origin()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, Origin(license="apache-2.0")),
        ({"general.source.huggingface.repository": "org/m"}, Origin(hub_id="org/m", license="apache-2.0")),
        ({"general.source.repo_url": "https://huggingface.co/org/m"}, Origin(hub_id="org/m", license="apache-2.0")),
        ({"general.repo_url": "https://huggingface.co/org/m/tree/main"}, Origin(hub_id="org/m", license="apache-2.0")),
        ({"general.source.repo_url": "https://github.com/org/m"}, Origin(license="apache-2.0")),
        (
            {"general.base_model.count": 1, "general.base_model.0.repo_url": "https://huggingface.co/org/parent"},
            Origin(parents=("org/parent",), license="apache-2.0"),
        ),
        ({"general.license": "other", "general.license.name": "n"}, Origin(license="other", license_name="n")),
    ],
)
def test_what_a_gguf_file_says(tmp_path: Path, metadata: dict[str, Any], expected: Origin) -> None:
    path = save_tiny_gguf("llama", tmp_path / "m.gguf", metadata=metadata)
    found = origin(path)
    assert found == expected
    assert found.to_json()["hub_id"] == expected.hub_id


def test_a_place_in_the_hubs_cache_names_the_repository(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "models--org--my-model" / "snapshots" / "0123abc")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.txt\n---\n")
    expected = "https://huggingface.co/org/my-model/blob/main/LICENSE.txt"
    assert origin(folder) == Origin(hub_id="org/my-model", license="other", license_link=expected)
    assert origin(shutil.copytree(folder, tmp_path / "models--org--other")).hub_id is None


def test_licences_and_notices_are_found(folder: Path, tiny: Tiny) -> None:
    for name in ("LICENSE", "NOTICE.txt", "licensed.json", "USE_POLICY.md", "license-mit"):
        (folder / name).write_text("text")
    names = [path.name for path in legal_files(open_model(str(folder)))]
    assert names == ["LICENSE", "NOTICE.txt", "USE_POLICY.md", "license-mit"]
    assert legal_files(open_model(str(tiny("llama.gguf")))) == []
