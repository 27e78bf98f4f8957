"""Artifacts on a stand-in for the Hub, through huggingface_hub's own code: what goes up, and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from compress.calibrate.errors import InputError
from compress.cli.main import main
from hub import TOKEN, Answer, Hub, Repo
from huggingface_hub import ModelCard, constants
from runs import arguments, digest, distance, logits, options, quick, refused
from transformers import AutoModelForCausalLM

import compress
from compress.artifact import hub as pushing
from compress.artifact.account import nearest_id
from compress.artifact.inspect import inspect
from compress.events import Message
from compress.pipeline import run
from compress.recipe import Recipe

Tiny = Callable[[str], Path]
NAME = "jane/tiny-W3"


@pytest.fixture(scope="module")
def made(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished artifact whose run named local paths with a space in them; copy it before you change it."""
    folder = tmp_path_factory.mktemp("home of jane") / "my corpora"
    folder.mkdir()
    own = shutil.copy(text, folder / "clients text.txt")
    model = shutil.copytree(tiny("llama"), folder / "base model")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: en\n---\n# M\n")
    (model / "LICENSE").write_text("Do good.")
    out = folder.parent / "out"
    quick(model, "rsq", out, Path(own), "eval.tasks=perplexity", f"eval.text={own}", "eval.window=32", "eval.windows=2")
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is a terminal."""
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)


def command(*words: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, ["push", *map(str, words)], input=answer)


def failing(method: str, part: str, status: int, message: str) -> Callable[[str, str], Answer | None]:
    """A ``fail`` that answers some requests with an error."""
    return lambda asked, path: (status, {"error": message}) if asked == method and part in path else None


def texts(repo: Repo) -> str:
    """Everything in a repository that people can read, in one string."""
    return "\n".join(content.decode() for name, content in repo.files.items() if not name.endswith(".safetensors"))


def test_an_artifact_arrives_whole_private_and_intact(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    (artifact / ".cache").mkdir()
    (artifact / ".cache" / "secret").write_text("mine")
    pushed = compress.push(artifact, NAME)
    repo = hub.repos[NAME]
    assert repo.private
    assert pushed.url == f"{hub.url}/{NAME}"
    assert pushed.commit == repo.head
    assert len(repo.commits) == 2
    assert "rsq, made by compress" in repo.commits[-1]
    own = {path.name for path in artifact.iterdir()} - {"notes.txt", ".cache"}
    assert set(repo.files) == own | {".gitattributes"}
    assert "LICENSE" in own
    copy = hub.download(NAME, tmp_path / "copy")
    assert digest(copy) == digest(artifact)
    found = inspect(copy)
    assert found.damaged == []
    assert found.report is not None
    assert Recipe.load(str(copy / "recipe.yaml")).model_dump(mode="json") == found.report["recipe"]
    loaded = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    assert distance(logits(loaded), logits(compress.load(artifact)[0])) < 1e-5


def test_no_local_path_goes_up(hub: Hub, artifact: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = made.parent
    report = json.loads((artifact / "report.json").read_text())
    report["command"] = (
        f"compress run --model '{home}/my corpora/base model' --out {artifact} --recipe rsq --push {NAME}"
    )
    report["eval"]["after"]["harness"] = {"configs": {"x": {"data_files": "/home/jane/tasks/x.jsonl", "key": TOKEN}}}
    (artifact / "report.json").write_text(json.dumps(report))
    assert str(home) in (artifact / "recipe.yaml").read_text()
    compress.push(artifact, NAME)
    sent = texts(hub.repos[NAME])
    for secret in (
        str(home),
        home.name,
        "my corpora",
        str(artifact.parent),
        "/home/jane",
        TOKEN,
        str(Path.home()) + "/",
    ):
        assert secret not in sent
    for kept in ("clients text.txt", "base model", "x.jsonl", f"--push {NAME}"):
        assert kept in sent
    assert str(home) in (artifact / "report.json").read_text()  # the artifact itself is as it was


def test_the_card_on_the_hub_names_the_repository(hub: Hub, artifact: Path) -> None:
    compress.push(artifact, "acme/tiny")
    card = ModelCard(hub.repos["acme/tiny"].files["README.md"].decode())
    assert card.data.get("quantized_by") == "acme"
    assert (card.data.license, card.data.get("license_name")) == ("other", "tiny")
    assert card.data.language in ("en", ["en"])
    assert 'from_pretrained("acme/tiny")' in card.text
    assert "# tiny\n" in card.text


def test_a_card_edited_by_hand_keeps_its_words(hub: Hub, artifact: Path, made: Path) -> None:
    card = (artifact / "README.md").read_text() + f"\nThanks to Ada. See {made.parent}/notes.md.\n"
    (artifact / "README.md").write_text(card)
    compress.push(artifact, NAME)
    sent = hub.repos[NAME].files["README.md"].decode()
    assert sent.endswith("\nThanks to Ada. See notes.md.\n")


def test_a_page_is_made_anew_without_paths(hub: Hub, artifact: Path, made: Path) -> None:
    (artifact / "report.html").write_text(f"an old page with {made.parent}")
    compress.push(artifact, NAME)
    page = hub.repos[NAME].files["report.html"].decode()
    assert str(made.parent) not in page
    assert "<html" in page


def test_the_same_push_again_sends_nothing(hub: Hub, artifact: Path) -> None:
    compress.push(artifact, NAME)
    head, uploads = hub.repos[NAME].head, len(hub.uploads())
    pushed = compress.push(artifact, NAME)
    assert (pushed.sent, pushed.commit, pushed.bytes_sent) == ([], head, 0)
    assert hub.repos[NAME].head == head
    assert len(hub.uploads()) == uploads
    assert "everything was there already" in pushed.lines()[0]


def test_new_scores_send_the_report_and_the_card_alone(hub: Hub, artifact: Path) -> None:
    compress.push(artifact, NAME)
    uploads = len(hub.uploads())
    report = json.loads((artifact / "report.json").read_text())
    report["eval"]["note"] = "Measured again."
    (artifact / "report.json").write_text(json.dumps(report))
    (artifact / "README.md").unlink()
    assert compress.push(artifact, NAME).sent == ["README.md", "report.html", "report.json"]
    assert len(hub.uploads()) == uploads
    assert b"Measured again" in hub.repos[NAME].files["README.md"]


def test_an_interrupted_push_goes_on(hub: Hub, artifact: Path) -> None:
    model = hashlib.sha256((artifact / "model.safetensors").read_bytes()).hexdigest()
    hub.fail = failing("PUT", model, 500, "out of order")
    with pytest.raises(InputError, match=r"status 500\); check the connection and give the same command again"):
        compress.push(artifact, NAME)
    assert list(hub.repos[NAME].files) == [".gitattributes"]  # never half an artifact
    tokenizer = hashlib.sha256((artifact / "tokenizer.json").read_bytes()).hexdigest()
    before = hub.uploads().count(tokenizer)
    hub.fail = lambda method, path: None
    hub.requests.clear()
    compress.push(artifact, NAME)
    assert hub.uploads().count(model) == 1
    assert before + hub.uploads().count(tokenizer) == 1
    assert hub.repos[NAME].files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()
    assert ("POST", "/api/repos/create") not in hub.requests


def test_a_commit_that_is_refused_keeps_what_was_sent(hub: Hub, artifact: Path) -> None:
    hub.fail = failing("POST", "/commit/", 503, "busy")
    with pytest.raises(InputError, match="status 503"):
        compress.push(artifact, NAME)
    hub.fail = lambda method, path: None
    hub.requests.clear()
    compress.push(artifact, NAME)
    assert hub.uploads() == []
    assert "model.safetensors" in hub.repos[NAME].files


def test_a_change_in_between_is_noticed(hub: Hub, artifact: Path) -> None:
    hub.repos[NAME] = Repo(private=True)
    plan = pushing.plan_push(artifact, pushing.Destination(NAME))
    hub.repos[NAME].commits.append("somebody else's")
    with pytest.raises(InputError, match="was changed meanwhile; give the same command again"):
        pushing.send(plan)


def test_a_dry_run_shows_everything_and_writes_nothing(hub: Hub, artifact: Path) -> None:
    (artifact / "thesis.pdf").write_text("mine")
    told = command(artifact, NAME, "--dry-run")
    assert told.exit_code == 0, told.output
    first, *_, total, left_out = told.stdout.splitlines()
    assert first == f"{artifact} -> {hub.url}/{NAME} (private, new)"
    assert any(line.split()[0] == "new" and line.endswith("model.safetensors") for line in told.stdout.splitlines())
    assert "to send" in total
    assert left_out == "not part of the artifact, left out: thesis.pdf"
    as_json = json.loads(command(artifact, NAME, "--dry-run", "--json").stdout)
    assert {file["name"] for file in as_json["files"]} >= {"model.safetensors", "report.json", "README.md"}
    assert as_json["public"] is False
    assert not hub.wrote()


@pytest.mark.usefixtures("terminal")
def test_a_terminal_is_asked(hub: Hub, artifact: Path) -> None:
    told = command(artifact, NAME, answer="n\n")
    assert told.exit_code == 1
    assert "Send it?" in told.stderr
    assert "nothing was sent" in told.stderr
    assert not hub.wrote()
    told = command(artifact, NAME, answer="y\n")
    assert told.exit_code == 0, told.output
    assert f"{hub.url}/{NAME} is complete: {len(list(artifact.iterdir()))} files" in told.stdout
    assert command(artifact, NAME).exit_code == 0  # nothing to send, nothing to ask


def test_without_a_terminal_yes_has_to_be_said(hub: Hub, artifact: Path) -> None:
    assert "there is no such folder" in refused("push", str(artifact / "nowhere"), NAME)
    assert "--yes: is needed where nobody can be asked" in refused("push", str(artifact), NAME)
    assert hub.requests == []
    told = command(artifact, NAME, "--yes", "--json")
    assert json.loads(told.stdout)["url"] == f"{hub.url}/{NAME}"


def test_an_interrupt_says_how_to_go_on(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pushing.HfApi, "create_commit", stop)
    told = command(artifact, NAME, "--yes")
    assert told.exit_code == 130
    assert "interrupted: the same command sends what isn't there yet" in told.stderr


def test_who_may_see_it(hub: Hub, artifact: Path) -> None:
    compress.push(artifact, NAME)
    assert "(public, private until now)" in command(artifact, NAME, "--public", "--dry-run").stdout
    assert hub.repos[NAME].private
    compress.push(artifact, NAME, public=True)
    assert not hub.repos[NAME].private
    assert "is public already, and a push is private unless it is said otherwise; add --public" in refused(
        "push", str(artifact), NAME, "--yes"
    )
    compress.push(artifact, "jane/open", public=True)
    assert not hub.repos["jane/open"].private


def test_another_artifact_is_refused_unless_it_is_to_be_replaced(
    hub: Hub, artifact: Path, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    other = quick(tiny("llama"), "rtn", tmp_path / "other", text).out
    compress.push(other, NAME)
    hub.repos[NAME].files["model-00001-of-00002.safetensors"] = b"of an older one"
    line = refused("push", str(artifact), NAME, "--yes")
    assert "the repository holds another artifact: model.model.safetensors was" in line or "recipe.calibration" in line
    assert "--overwrite" in line
    plan = command(artifact, NAME, "--overwrite", "--dry-run").stdout
    assert "changed" in plan
    assert "removed              model-00001-of-00002.safetensors" in plan
    compress.push(artifact, NAME, overwrite=True)
    assert "model-00001-of-00002.safetensors" not in hub.repos[NAME].files
    assert ".gitattributes" in hub.repos[NAME].files
    assert hub.repos[NAME].files["model.safetensors"] == (artifact / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "harmless"), [("README.md", True), ("LICENSE", True), ("pytorch_model.bin", False)])
def test_what_may_be_there_before(hub: Hub, artifact: Path, name: str, harmless: bool) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.repos[NAME].files[name] = b"x"
    if harmless:
        compress.push(artifact, NAME)
        assert "model.safetensors" in hub.repos[NAME].files
    else:
        assert f"holds something else ({name})" in refused("push", str(artifact), NAME, "--yes")
        assert not hub.wrote()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"artifact": 1}', b'{"artifact": {}, "fingerprint": 2}'])
def test_a_report_that_isnt_ours_is_something_else(hub: Hub, artifact: Path, content: bytes) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.repos[NAME].files["report.json"] = content
    assert "holds something else (report.json)" in refused("push", str(artifact), NAME, "--yes")


def test_files_that_the_new_export_lacks_are_removed(hub: Hub, artifact: Path) -> None:
    compress.push(artifact, NAME)
    report = json.loads((artifact / "report.json").read_text())
    del report["artifact"]["files"]["generation_config.json"]
    (artifact / "report.json").write_text(json.dumps(report))
    compress.push(artifact, NAME)
    assert "generation_config.json" not in hub.repos[NAME].files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: (out / "tokenizer.json").unlink(), "is damaged: tokenizer.json"),
        (lambda out: (out / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}"), "is damaged: model.safetensors"),
        (lambda out: (out / "report.json").unlink(), "isn't an artifact"),
        (lambda out: shutil.rmtree(out), "there is no such folder"),
        (lambda out: (out / "state.json").write_text("{}"), "is the work of an unfinished run"),
        (lambda out: (out.parent / "state.json").write_text("{}"), "is the work of an unfinished run"),
    ],
)
def test_only_a_whole_artifact_is_pushed(hub: Hub, artifact: Path, change: Callable[[Path], Any], words: str) -> None:
    change(artifact)
    assert words in refused("push", str(artifact), NAME, "--yes")
    assert not hub.wrote()


def test_an_unfinished_run_is_named(hub: Hub, artifact: Path) -> None:
    (artifact.parent / "new.partial").mkdir()
    (artifact.parent / "new.partial" / "state.json").write_text("{}")
    line = refused("push", str(artifact.parent / "new"), NAME, "--yes")
    assert "isn't finished: its work is in new.partial; give the command of its run again" in line
    report = json.loads((artifact / "report.json").read_text())
    (artifact / "report.json").write_text(json.dumps(report | {"seconds": None}))
    assert "stopped before the scores" in refused("push", str(artifact), NAME, "--yes")


@pytest.mark.parametrize("name", ["../other/secret", "/etc/passwd", ".env"])
def test_a_report_cant_name_files_elsewhere(hub: Hub, artifact: Path, name: str) -> None:
    target = artifact / name
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        target.write_text("mine")
    facts = {"bytes": target.stat().st_size, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
    report = json.loads((artifact / "report.json").read_text())
    report["artifact"]["files"][name] = facts
    (artifact / "report.json").write_text(json.dumps(report))
    assert "which can't be a file of an artifact" in refused("push", str(artifact), NAME, "--yes")
    assert not hub.wrote()


def test_nobody_logged_in(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    line = refused("push", str(artifact), NAME, "--yes")
    assert "you are not logged in to the Hub; run `hf auth login`, or set HF_TOKEN" in line


@pytest.mark.parametrize(
    ("role", "scopes", "words"),
    [
        ("read", None, "your token can only read"),
        ("fineGrained", [], "your token has no right to write to jane"),
        ("fineGrained", [("jane", "repo.content.read")], "your token has no right to write to jane"),
        ("fineGrained", [("acme", "repo.write")], "your token has no right to write to jane"),
        ("fineGrained", [("jane", "repo.write")], None),
        ("fineGrained", [(NAME, "repo.write")], None),
        ("write", None, None),
    ],
)
def test_rights_of_tokens(
    hub: Hub, artifact: Path, role: str, scopes: list[tuple[str, str]] | None, words: str | None
) -> None:
    token: dict[str, Any] = {"role": role}
    if scopes is not None:
        token["fineGrained"] = {
            "scoped": [{"entity": {"name": name}, "permissions": [right]} for name, right in scopes]
        }
    hub.account["auth"] = {"accessToken": token}
    if words is None:
        compress.push(artifact, NAME)
    else:
        assert words in refused("push", str(artifact), NAME, "--yes")
        assert not hub.wrote()


@pytest.mark.parametrize(
    ("method", "part", "status", "message", "words"),
    [
        (
            "GET",
            "whoami",
            401,
            "Invalid username or password.",
            "the Hub doesn't accept your token; run `hf auth login`",
        ),
        ("GET", "whoami", 429, "slow down", "the Hub asks to slow down"),
        ("POST", "repos/create", 403, "You don't have the rights", "may not write there (You don't have the rights)"),
        (
            "POST",
            "/commit/",
            403,
            "Private storage limit reached",
            "storage limit is reached (Private storage limit reached)",
        ),
        ("POST", "/commit/", 409, "conflict", "was changed meanwhile"),
        ("POST", "/commit/", 400, "bad file", "the Hub refused with status 400 (bad file)"),
        ("PUT", "/lfs/", 403, f"denied to {TOKEN} https://s3/?X-Signature=abc", "may not write there (denied to"),
        ("POST", "preupload", 401, f"token {TOKEN} revoked", "the Hub doesn't accept your token"),
    ],
)
def test_refusals_of_the_hub(
    hub: Hub,
    artifact: Path,
    method: str,
    part: str,
    status: int,
    message: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.fail = failing(method, part, status, message)
    told = command(artifact, NAME, "--yes")
    assert told.exit_code == 2, (told.output, told.exception)
    assert words in told.stderr.splitlines()[-1]
    assert TOKEN not in told.output + caplog.text
    assert "X-Signature" not in told.stderr.splitlines()[-1]
    assert list(hub.repos.get(NAME, Repo(True)).files) == [".gitattributes"]


def test_no_right_to_an_existing_repository(hub: Hub, artifact: Path) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.fail = failing("GET", "auth-check/write", 403, "Forbidden")
    assert "your account or token may not write there" in refused("push", str(artifact), NAME, "--yes")
    assert not hub.wrote()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jaen/x", "jaen is neither your account nor an organization of yours; did you mean 'jane'?"),
        ("zzz/x", "your account can write to: jane, acme, readers"),
        ("readers/x", "your account can only read in readers"),
        ("x", "names no account; give it as ORG/NAME, for instance your-name/x"),
        ("jane/my model", "did you mean 'jane/my-model'?"),
        ("jane/x--y..z.git", "did you mean 'jane/x-y.z'?"),
        ("a/b/c", "did you mean 'a/b'?"),
        ("https://huggingface.co/jane/x", "did you mean 'jane/x'?"),
        ("???", "can't be a name on the Hub; allowed: ORG/NAME"),
    ],
)
def test_names(hub: Hub, artifact: Path, name: str, words: str) -> None:
    assert words in refused("push", str(artifact), name, "--yes")
    assert not hub.wrote()


@pytest.mark.parametrize("name", ["x" * 200, "-.-/x", "jane/" + "-a" * 60, "models/jane/x", "jane/ü"])
def test_the_nearest_name_is_possible(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    near = nearest_id(name)
    assert near
    validate_repo_id(near)


def test_out_of_reach(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hub is switched off (HF_HUB_OFFLINE)" in refused("push", str(artifact), NAME, "--yes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in refused("push", str(artifact), NAME, "--yes")
    assert hub.requests == []


def test_a_run_that_pushes(hub: Hub, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    chosen = options("rtn", text, push=NAME, public=True)
    result = run(str(tiny("llama")), "rtn", out=tmp_path / "out", options=chosen)
    assert result.ok
    assert result.url == f"{hub.url}/{NAME}"
    assert not hub.repos[NAME].private
    assert result.summary[-1] == f"push     {hub.url}/{NAME}: compress generate {NAME} --prompt 'Hello'"
    assert len(result.summary) <= 12
    again = run(str(tiny("llama")), "rtn", out=tmp_path / "out", options=chosen)
    assert again.ok
    assert len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (
            lambda hub: hub.account["auth"]["accessToken"].update(role="read"),
            "--push=jane/tiny-W3: your token can only read",
        ),
        (lambda hub: hub.repos.update({NAME: Repo(False)}), "is public already"),
        (lambda hub: hub.repos.update({NAME: Repo(True, {"model.gguf": b""})}), "holds something else (model.gguf)"),
    ],
)
def test_a_run_finds_out_before_it_works(
    hub: Hub, tiny: Tiny, text: Path, tmp_path: Path, prepare: Callable[[Hub], Any], words: str
) -> None:
    prepare(hub)
    line = arguments(tiny("llama"), "rtn", tmp_path / "out", options("rtn", text))
    assert words in refused(*line, "--push", NAME)
    assert list(tmp_path.iterdir()) == []
    assert not hub.wrote()


def test_a_run_is_told_of_another_artifact_there(
    hub: Hub, artifact: Path, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    compress.push(artifact, NAME)
    line = arguments(tiny("llama"), "rtn", tmp_path / "new", options("rtn", text))
    assert "holds another artifact: recipe.calibration" in refused(*line, "--push", NAME)
    assert not (tmp_path / "new").exists()
    told = CliRunner().invoke(main, [*line, "--push", "jane/other", "--dry-run"])
    assert f"push       {hub.url}/jane/other (private, new)" in told.stdout


def test_public_alone_says_nothing(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    line = arguments(tiny("llama"), "rtn", tmp_path / "out", options("rtn", text))
    assert "there is no --push" in refused(*line, "--public")


def test_a_failed_push_never_loses_the_artifact(hub: Hub, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    hub.fail = failing("POST", "/commit/", 403, "Storage quota exceeded")
    out = tmp_path / "out"
    events: list[Any] = []
    chosen = options("rtn", text, push=NAME)
    result = run(str(tiny("llama")), "rtn", out=out, options=chosen, on_event=events.append)
    assert not result.ok
    assert result.url is None
    assert result.summary[-1].endswith(f"the artifact is complete: compress push {out} {NAME}")
    assert any(isinstance(event, Message) and event.level == "warning" for event in events)
    assert inspect(out).damaged == []
    line = arguments(tiny("llama"), "rtn", out, options("rtn", text))
    told = CliRunner().invoke(main, [*line, "--push", NAME])
    assert told.exit_code == 1
    assert "FAILED" in told.stdout
    hub.fail = lambda method, path: None
    assert command(out, NAME, "--yes").exit_code == 0
    assert "model.safetensors" in hub.repos[NAME].files
