"""The stage ``act``: what it refuses, where its questions come from, its report and its artifact."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_tokenizer, save_tiny

import compress
from compress.act.part import CalibratedPart
from compress.act.questions import Wanted, task_questions, text_questions
from compress.events import Event, StageStarted, StepDone
from compress.kv.layer import PlanLayer
from compress.pipeline import plan, run
from compress.plan import Calibration, read_plan
from compress.runtime.plan_cache import PlanCache

SHORT: dict[str, Any] = {"items": 8, "tokens": 48, "edge_layers": 1, "alpha": 1.5, "level": 1.0, "holdout": 0.0}
TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    {split}: questions.jsonl
    test: questions.jsonl
{name}_split: {split}
test_split: test
output_type: {kind}
doc_to_text: "What is {{{{question}}}}?  "
doc_to_target: "{target}"
{choices}
"""


def recipe(**act: Any) -> dict[str, Any]:
    return {"name": "test", "act": {**SHORT, **act}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data of a task, whose file `write_task` writes."""
    import datasets

    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{n} + {n}", "choices": [str(2 * n + 1), str(2 * n), "a hen"], "label": 1, "sum": str(2 * n)}
        for n in range(12)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return folder


def write_task(folder: Path, name: str = "training", split: str = "train", choice: bool = True) -> str:
    choices = 'doc_to_choice: "{{choices}}"' if choice else "generation_kwargs: {until: ['.']}"
    kind, target = ("multiple_choice", "{{label}}") if choice else ("generate_until", "{{sum}}")
    text = TASK.format(name=name, split=split, kind=kind, target=target, choices=choices)
    (folder / "sums.yaml").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens": 5000}, "act.tokens.*5000.*512"),
        ({"edge_layers": 2}, "act.edge_layers.*none of the model's 3 layers"),
        ({"objective": "choice"}, "act.objective.*name act.tasks"),
        ({"tasks": ["passkey"]}, "act.tasks.*passkey"),
        ({"tasks": ["piqqa"]}, "act.tasks.*piqqa.*no such task"),
        ({"task_path": "/nowhere", "tasks": ["piqa"]}, "act.task_path"),
        ({"beta": 1.5}, "act.beta"),
        ({"alhpa": 3}, "act.alhpa.*alpha"),
    ],
)
def test_what_cannot_be_is_refused(llama: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(str(llama), recipe(**changed))
    assert "\n" not in str(caught.value)
    assert re.search(told, str(caught.value)), caught.value


@pytest.mark.usefixtures("_no_page")
def test_the_artifact_is_calibrated(llama: Path, text: Path, tmp_path: Path) -> None:
    out, events = tmp_path / "out", list[Event]()
    result = run(str(llama), recipe(text=str(text)), out=out, on_event=events.append)
    assert StageStarted("act", 8, "questions") in events
    assert [e.index for e in events if isinstance(e, StepDone)] == list(range(8))
    report = json.loads((out / "report.json").read_text())["act"]
    assert [own["calibrated"] for own in report["layers"]] == [[], [0, 1], []]
    assert all(own["sinks"] > 0 for own in report["layers"])
    assert {(own["layer"], own["head"]) for own in report["heads"]} == {(1, 0), (1, 1)}
    assert report["questions"] == {"choosing": 8, "held_out": 0, "sources": ["text"], "median_tokens": 48}
    assert any(line.startswith("act      2 KV heads") for line in result.summary)
    found = read_plan(out)
    assert found is not None
    assert found.writers == {"calibration": "act"}
    assert found.layers[1].heads[0].calibration == Calibration(0.4, 1.5, relative=True)
    model, _ = compress.load(out)
    cache = PlanCache(model.config, model.attention_plan)
    layer = cache.layers[1]
    assert isinstance(layer, PlanLayer)
    assert isinstance(layer.clusters[0].part, CalibratedPart)
    ids = torch.randint(5, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = model(ids, past_key_values=cache).logits
        dense = compress.load(llama)[0](ids).logits
    assert float((changed.float() - dense.float()).abs().max()) > 1e-3
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] <= 64


@pytest.mark.usefixtures("_no_page")
def test_heads_that_do_not_help_on_other_questions_are_left(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.act import measure

    losses = iter([1.0, 1.1] * 2)  # of each question without and with the heads
    monkeypatch.setattr(measure, "question_loss", lambda *args: (next(losses), None))
    run(str(llama), recipe(text=str(text), holdout=0.25), out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())["act"]
    assert report["heads"]
    assert not report["calibrated"]
    assert "not on questions held out" in report["summary"]
    assert report["held_out"]["loss"]["n"] == 2
    assert read_plan(tmp_path / "out") is None


@pytest.mark.usefixtures("_no_page")
def test_a_killed_run_goes_on_behind_the_last_question(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.act import measure

    class KilledError(Exception):
        pass

    real, asked = measure.slopes, list[int]()

    def slopes(*args: Any) -> Any:
        if len(asked) == 3:
            raise KilledError
        asked.append(1)
        return real(*args)

    monkeypatch.setattr(measure, "slopes", slopes)
    with pytest.raises(KilledError):
        run(str(llama), recipe(text=str(text)), out=tmp_path / "out")
    monkeypatch.setattr(measure, "slopes", lambda *args: (asked.append(2), real(*args))[1])
    run(str(llama), recipe(text=str(text)), out=tmp_path / "out")
    assert asked == [1] * 3 + [2] * 5


@pytest.mark.usefixtures("_no_page")
def test_heads_of_others_are_left_alone(llama: Path, text: Path, tmp_path: Path) -> None:
    """KV bits of a layer leave its heads out; a plan taken over keeps calibrated heads until others are changed."""
    first = tmp_path / "first"
    run(str(llama), recipe(text=str(text)), out=first)
    again = read_plan(first)
    run(str(first), {"name": "test", "kv": {"method": "zipcache"}}, out=tmp_path / "second")
    packed = read_plan(tmp_path / "second")
    assert again is not None
    assert packed is not None
    assert packed.writers == {"kv": "zipcache"}
    run(str(tmp_path / "second"), recipe(text=str(text)), out=tmp_path / "third")
    report = json.loads((tmp_path / "third" / "report.json").read_text())["act"]
    assert report["heads"] == []
    assert read_plan(tmp_path / "third") == packed


def test_questions_of_a_task(tasks: Path) -> None:
    tokenizer = build_tokenizer()
    wanted = Wanted(("sums",), "train", write_task(tasks), 5, 100, seed=0)
    found = task_questions(tokenizer, wanted)
    assert len(found) == 5
    assert len({tuple(question.right.ids.tolist()) for question in found}) == 5
    for question in found:
        assert (question.gold, len(question.answers), question.source) == (1, 3, "sums")
        item = question.right
        text = tokenizer.decode(item.ids)
        n = int(re.match(r"What is (\d+) ", text)[1])  # type: ignore[index]
        behind = tokenizer.decode(item.ids[1:][item.supervised[:-1]])
        assert behind == f"   {2 * n}"  # spaces at the prompt's end belong to the answer
    assert task_questions(tokenizer, wanted)[0].right.ids.tolist() == found[0].right.ids.tolist()
    short = Wanted(("sums",), "train", str(tasks), 5, 10, seed=0)
    assert task_questions(tokenizer, short) == []


def test_a_task_that_generates_has_one_answer(tasks: Path) -> None:
    found = task_questions(build_tokenizer(), Wanted(("sums",), "train", write_task(tasks, choice=False), 3, 100, 0))
    assert [len(question.answers) for question in found] == [1, 1, 1]


def test_a_split_that_is_not_there_is_refused(tasks: Path) -> None:
    wanted = Wanted(("sums",), "train", write_task(tasks, "validation", "validation"), 5, 100, seed=0)
    with pytest.raises(InputError, match=r"act.tasks.*no train questions.*act.split=validation"):
        task_questions(build_tokenizer(), wanted)


def test_windows_of_a_text_answer_their_first_half(text: Path) -> None:
    first, second = text_questions(build_tokenizer(), str(text), 2, 40, seed=1)
    assert len(first.right.ids) == 40
    assert first.right.supervised.nonzero()[:, 0].tolist() == list(range(19, 39))
    assert first.right.ids.tolist() != second.right.ids.tolist()
    with pytest.raises(InputError, match=r"act\.text"):
        text_questions(build_tokenizer(), str(text), 2, 100_000, seed=1)
