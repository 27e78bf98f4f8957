"""Artifacts loaded by their Hub id, through huggingface_hub's own code and a stand-in for the Hub."""

from collections.abc import Callable
from pathlib import Path

import pytest
from compress.calibrate.errors import InputError
from hub import Hub, Repo
from huggingface_hub import constants
from runs import distance, logits, quick

import compress
from compress.bench import original
from compress.source import GGUF_FILE

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("_no_page")
FITTING = ("weights.group_size=32", "weights.bits=4", "weights.symmetric=true", "weights.rotation=hadamard")
NAME = "jane/tiny-W4"


def on_the_hub(hub: Hub, folder: Path) -> None:
    """The files of a folder, as a repository."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    hub.repos[NAME] = Repo(private=True, files=files)


def fetched() -> set[str]:
    """The files of the repository that are in the cache, but for what it keeps for itself."""
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts by their first format."""
    root = tmp_path_factory.mktemp("formats")
    orders = {"compressed-tensors": "compressed-tensors,gptq,gguf", "gguf": "gguf,gptq"}
    for first, formats in orders.items():
        quick(tiny("llama"), "rtn", root / first, text, *FITTING, f"export.formats=[{formats}]")
    return {first: root / first for first in orders}


@pytest.mark.parametrize("again", ["online", "offline"])
def test_an_artifact_whose_first_format_is_gguf(
    hub: Hub, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    on_the_hub(hub, made["gguf"])
    expected = logits(compress.load(made["gguf"])[0])
    assert distance(logits(compress.load(NAME)[0]), expected) < 1e-5
    assert GGUF_FILE in fetched()
    assert not any("/" in name for name in fetched())
    if again == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert distance(logits(compress.load(NAME)[0]), expected) < 1e-5


def test_the_first_format_comes_without_the_folders_of_the_others(hub: Hub, made: dict[str, Path]) -> None:
    on_the_hub(hub, made["compressed-tensors"])
    expected = logits(compress.load(made["compressed-tensors"])[0])
    assert distance(logits(compress.load(NAME)[0]), expected) < 1e-5
    assert not any("/" in name or name.endswith(".gguf") for name in fetched())


@pytest.mark.parametrize("first", ["compressed-tensors", "gguf"])
def test_another_format_is_named_by_its_folder(hub: Hub, made: dict[str, Path], first: str) -> None:
    on_the_hub(hub, made[first])
    expected = logits(compress.load(made[first] / "gptq")[0])
    assert distance(logits(compress.load(f"{NAME}/gptq")[0]), expected) < 1e-5
    assert {name for name in fetched() if "/" not in name} == {"report.json"}
    assert {name.partition("/")[0] for name in fetched()} == {"report.json", "gptq"}


@pytest.mark.parametrize("folder", ["", "/gptq"])
def test_the_original_of_an_artifact_is_in_its_report(hub: Hub, made: dict[str, Path], tiny: Tiny, folder: str) -> None:
    on_the_hub(hub, made["gguf"])
    assert original(NAME + folder).model == str(tiny("llama"))
    assert fetched() == {"report.json", f"{folder.strip('/')}/config.json".lstrip("/")}
    del hub.repos[NAME].files["report.json"]
    with pytest.raises(InputError, match=r"ARTIFACT=jane/tiny-W4.*: is not an artifact: it has no report\.json"):
        original(NAME + folder)
    with pytest.raises(InputError, match=r"ARTIFACT=jane/other: neither a local path nor a model on the Hub"):
        original("jane/other")


def test_what_is_no_format_that_can_be_loaded(hub: Hub, made: dict[str, Path]) -> None:
    on_the_hub(hub, made["compressed-tensors"])
    with pytest.raises(InputError, match=r"the folder gguf of this repository holds no safetensors.*\.gguf file of it"):
        compress.load(f"{NAME}/gguf")
    with pytest.raises(InputError, match="the folder awq of this repository holds no safetensors"):
        compress.load(f"{NAME}/awq")


def test_a_path_that_is_wrong_below_a_folder_isnt_asked_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match=r"models/small/base: there is no such file or folder"):
        compress.load("models/small/base")
    assert not hub.requests
