"""Two models measured beside each other. What is timed is never compared with a number."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from compress.evalsuite.efficiency import Pass
from models import build_model
from runs import quick, refused
from tiny_cache import HalfCache
from transformers import PreTrainedModel

from compress import bench_side
from compress.bench import Subject, bench, save
from compress.bench_section import Measured, section
from compress.bench_side import Facts, OpenSide, Settings
from compress.events import Message
from compress.kv.growing import STEP
from compress.options import BenchOptions

Tiny = Callable[[str], Path]
METRICS = [
    "weight_bytes_on_disk",
    "weight_bytes_in_memory",
    "peak_memory",
    "peak_memory_generating",
    "time_to_first_token",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
]
QUICK = BenchOptions(prompt_tokens=12, new_tokens=3, rounds=2, lengths=(20, 6))


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick(tiny("llama"), "rtn", tmp_path_factory.mktemp("bench") / "out", text).out


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "out")


@pytest.mark.slow
def test_an_artifact_against_its_original(copy: Path, tiny: Tiny) -> None:
    line = ["bench", str(copy), "--prompt-tokens", "12", "--new-tokens", "3", "--rounds", "2", "--lengths", "20,6"]
    before = json.loads((copy / "report.json").read_text())
    result = CliRunner().invoke(main, [*line, "--device", "cpu", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    assert json.loads((copy / "report.json").read_text()) == before | {"efficiency": found}
    assert f"saved in {copy / 'report.json'}" in result.stderr
    assert "leaked" not in result.stderr
    assert 'id="speed"' in (copy / "report.html").read_text()
    assert "Writing speed" in (copy / "README.md").read_text()
    assert (found["baseline"], found["model"]) == ("llama", "out")
    assert (found["device"], found["dtype"], found["rounds"], found["spread"]) == ("cpu", "float32", 2, "min-max")
    assert (found["prompt_tokens"], found["new_tokens"], found["threads"] > 0) == (12, 3, True)
    rows = {row["metric"]: row for row in found["rows"]}
    assert set(METRICS[:2]) | set(METRICS[4:]) <= set(rows) <= set(METRICS)
    for row in rows.values():
        assert row["baseline"] >= 0
        assert row["ratio_low"] is None or row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    disk = rows["weight_bytes_on_disk"]
    assert disk["baseline"] == (tiny("llama") / "model.safetensors").stat().st_size
    assert disk["model"] == (copy / "model.safetensors").stat().st_size
    assert disk["ratio"] == disk["ratio_low"] == disk["model"] / disk["baseline"]
    assert rows["weight_bytes_in_memory"]["baseline"] >= 4 * build_model("llama").num_parameters()
    # packed codes, each group of 8 inputs filled up to 32
    assert rows["weight_bytes_in_memory"]["model"] < 0.7 * rows["weight_bytes_in_memory"]["baseline"]
    assert not [note for note in found["notes"] if "transformers unpacked the weights" in note]
    bytes_a_token = 3 * 2 * 2 * 16 * 4
    assert found["kv"] == [
        {"length": n, "baseline_bytes": n * bytes_a_token, "model_bytes": STEP * bytes_a_token, "ratio": STEP / n}
        for n in (6, 20)
    ]


class Here:
    """A worker without a process."""

    def __init__(self, make: Callable[[], Any], owner: Any) -> None:
        self.make, self.made = make, None

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.made = None

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.made = self.made or self.make()
        return function(self.made, *arguments)


def test_a_model_with_itself_and_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.bench.Worker", Here)
    load = partial(build_model, "llama")
    events: list[Any] = []
    found = bench(Subject(load, HalfCache), Subject(load), replace(QUICK, rounds=1), events.append)
    assert (found["baseline"], found["model"], found["notes"]) == ("build_model", "build_model with HalfCache", [])
    rows = {row["metric"]: row for row in found["rows"]}
    assert "weight_bytes_on_disk" not in rows  # a function's model has no file
    assert rows["weight_bytes_in_memory"]["ratio"] == 1.0
    assert rows["decode_tokens_per_second"]["ratio"] > 0
    assert rows["decode_tokens_per_second"]["ratio_low"] is None  # a single round has no spread
    assert [row["ratio"] for row in found["kv"]] == [0.5, 0.5]
    told = [event.text for event in events if isinstance(event, Message)]
    assert [text.split()[0] for text in told] == ["baseline", "model", "round"]


def test_one_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return build_model("llama")

    monkeypatch.setattr("compress.bench.Worker", Here)
    monkeypatch.setattr("compress.bench_side.free_bytes", lambda device: 0)
    events: list[Any] = []
    bench(Subject(load), Subject(load), QUICK, events.append)
    assert [event.text for event in events if isinstance(event, Message) and "memory is short" in event.text]
    assert len(loads) == 2 + 2 * QUICK.rounds + 1  # a turn is two answers, and the last counts bytes too
    loads.clear()
    monkeypatch.setattr("compress.bench_side.free_bytes", lambda device: 1 << 60)
    bench(Subject(load), Subject(load), QUICK)
    assert len(loads) == 2


def test_the_context_of_a_function_s_model_is_seen_once_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.bench.Worker", Here)
    load = partial(build_model, "llama")
    with pytest.raises(InputError, match="--lengths=513: beyond the context of 512"):
        bench(Subject(load), Subject(load), replace(QUICK, lengths=(513,)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rounds": 0}, "--rounds=0"),
        ({"new_tokens": 1}, "--new-tokens=1"),
        ({"new_tokens": 512}, r"--new-tokens=512: beyond the context of 512 tokens; allowed: 2 to 511"),
        ({"prompt_tokens": 0}, "--prompt-tokens=0"),
        ({"prompt_tokens": 500}, r"--prompt-tokens=500: with 32 new ones beyond the context of 512 .* 1 to 480"),
        ({"lengths": (20, 513)}, r"--lengths=513: beyond the context of 512 tokens; allowed: 2 to 512"),
        ({"lengths": (1, 9)}, "--lengths=1"),
        ({"device": "cuda:77"}, "--device=cuda:77"),
        ({"dtype": "flaot16"}, r"--dtype=flaot16: .*did you mean 'float16'"),
    ],
)
def test_bad_options(artifact: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        bench(artifact, options=BenchOptions(**options))


def test_bad_models(copy: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert "is not an artifact: it has no report.json" in refused("bench", str(tiny("llama")))
    assert "ARTIFACT=" in refused("bench", str(tmp_path / "nothing"), "--against", str(tiny("llama")))
    assert "--against=" in refused("bench", str(copy), "--against", str(tmp_path / "nothing"))
    report = json.loads((copy / "report.json").read_text())
    for source, problem in (
        (str(tmp_path / "gone"), "can't be opened: there is no such file or folder"),
        (str(tiny("qwen3")), "parameters, the original had"),
    ):
        report["model"]["source"] = source
        (copy / "report.json").write_text(json.dumps(report))
        line = refused("bench", str(copy))
        assert line.startswith("error: --against=dense: ")
        assert problem in line
        assert line.endswith("name it, or another model: --against MODEL")


def test_a_damaged_artifact_is_refused_before_anything_is_loaded(
    copy: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.bench.Worker", None)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x55
    weights.write_bytes(content)
    line = refused("bench", str(copy), "--against", str(tiny("llama")))
    assert line.startswith("error: ARTIFACT=")
    assert "is damaged: model.safetensors changed" in line


def test_a_function_that_cannot_be_sent(tiny: Tiny) -> None:
    def load() -> PreTrainedModel:
        return build_model("llama")

    with pytest.raises(InputError, match="a function has no original"):
        bench(Subject(load))
    with pytest.raises(InputError, match=r"ARTIFACT=load: can't be sent to a process of its own"):
        bench(Subject(load), tiny("llama"), QUICK)


def test_only_a_comparison_with_the_original_is_saved(copy: Path, tiny: Tiny, tmp_path: Path) -> None:
    before = (copy / "report.json").read_text()
    other = Path(shutil.copytree(tiny("llama"), tmp_path / "moved"))
    assert save(tiny("llama"), "dense", {"a": 1}) is None
    assert save(copy, copy, {"a": 1}) is None
    assert save(copy, tiny("qwen3"), {"a": 1}) is None
    assert (copy / "report.json").read_text() == before
    for against in ("dense", other):
        assert save(copy, against, {"against": str(against)}) == copy / "report.json"
        assert json.loads((copy / "report.json").read_text()) == json.loads(before) | {
            "efficiency": {"against": str(against)}
        }
    assert not list(copy.glob("*.part"))


def facts(disk: int | None, memory: int) -> Facts:
    return Facts(disk, memory, 1000, 10_000, True, 0, 0.1, "float32", "cpu", 1)


@pytest.mark.parametrize(
    ("baseline", "model", "notes"),
    [
        (facts(4000, 4000), facts(4000, 4000), []),
        (facts(2000, 4000), facts(2000, 4000), []),  # 16 bits, computed in 32
        (facts(2000, 2000), facts(None, 2000), []),
        (facts(2000, 2000), facts(500, 540), []),  # a runtime that computes on packed weights
        (facts(2000, 2000), facts(500, 2000), ["m takes 4.0 bits a weight on disk and 16 in memory here"]),
        (
            facts(625, 4000),
            facts(500, 4000),
            [
                "m takes 4.0 bits",
                "the file of b is itself quantized (5.0 bits a weight); at 16 bits it would be 0.0 MB",
            ],
        ),
    ],
)
def test_notes_follow_from_the_bytes(baseline: Facts, model: Facts, notes: list[str]) -> None:
    measured = Measured(facts={"baseline": baseline, "model": model}, kv={"baseline": [0], "model": [8]})
    passes, peaks = measured.begin_round()
    for side, seconds in (("baseline", 2.0), ("model", 1.0)):
        passes[side] += [Pass(seconds, seconds, seconds), Pass(3 * seconds, 3 * seconds, 3 * seconds)]
        peaks[side] += [100, 200] if side == "baseline" else [50, 40]
    settings = Settings(8, 5, (4,), "cpu", torch.float32, 0, False)
    found = section(measured, {"baseline": "b", "model": "m"}, settings, 1)
    assert [note[: len(start)] for note, start in zip(found["notes"], notes, strict=True)] == notes
    rows = {row["metric"]: row for row in found["rows"]}
    assert (rows["peak_memory"]["baseline"], rows["peak_memory"]["model"]) == (10_000, 10_000)
    assert (rows["peak_memory_generating"]["baseline"], rows["peak_memory_generating"]["model"]) == (200, 50)
    assert (rows["time_to_first_token"]["baseline"], rows["time_to_first_token"]["ratio"]) == (4.0, 0.5)
    assert (rows["prefill_tokens_per_second"]["model"], rows["prefill_tokens_per_second"]["ratio"]) == (4.0, 2.0)
    assert rows["decode_tokens_per_second"]["baseline"] == 1.0
    assert found["kv"] == [{"length": 4, "baseline_bytes": 0, "model_bytes": 8, "ratio": None}]
    measured.facts["model"] = replace(model, resettable=False)
    unknown = {row["metric"] for row in section(measured, {"baseline": "b", "model": "m"}, settings, 1)["rows"]}
    assert set(rows) - unknown == {"peak_memory_generating"}  # a peak that includes loading says nothing of it
    measured.facts = {side: replace(known, load_peak=None) for side, known in measured.facts.items()}
    measured.peaks[0] = {"baseline": [None, None], "model": [None, None]}
    unknown = {row["metric"] for row in section(measured, {"baseline": "b", "model": "m"}, settings, 1)["rows"]}
    assert set(rows) - unknown == {"peak_memory", "peak_memory_generating"}


def test_threads_of_packed_layers(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def load(model: str, **options: Any) -> None:
        found.update(options)
        raise InputError("--model", model, "was to be loaded")

    monkeypatch.setattr(bench_side, "load", load)
    settings = Settings(8, 5, (4,), "cpu", torch.float32, 0, False, packed_threads=3)
    with pytest.raises(InputError, match="was to be loaded"):
        OpenSide(Subject(str(artifact)), settings)()
    assert found["threads"] == 3
    assert "--threads" in refused("bench", str(artifact), "--threads", "0")
    with pytest.raises(InputError, match="--threads=0: nothing would be computed"):
        bench(str(artifact), str(artifact), BenchOptions(threads=0))
