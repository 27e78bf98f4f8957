"""The stage ``kv``: what it refuses and predicts, and bits chosen from calibration under a budget."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.calibrate.stream import ActivationFile
from models import save_tiny
from runs import InterruptedRunError, Log, quick

from compress.events import LayerDone
from compress.kv.budget import CANDIDATES, Choice, Profile, choose, prompt_tokens
from compress.kv.settings import packing_of
from compress.model import ModelView, open_model, run_layer
from compress.options import RunOptions
from compress.pipeline import plan, run
from compress.plan import KVBits, read_plan
from compress.recipe import Recipe
from compress.schema import KV

Tiny = Callable[[str], Path]
SMALL = ("kv.first_flush=16", "kv.flush=8", "kv.window_min=4", "kv.sinks=2")
TEXT = ("eval=null", "calibration.samples=2", "calibration.seq_len=64")
BUDGET = ("kv.budget_tokens=2048", *SMALL, *TEXT)

pytestmark = pytest.mark.usefixtures("_no_page")


def planned(model: Path, *sets: str, recipe: str = "zipcache-plus") -> list[str]:
    return plan(str(model), recipe, RunOptions(set=("eval=null", *sets))).lines()


def refusal(model: Path, *sets: str) -> str:
    with pytest.raises(InputError) as caught:
        planned(model, *sets)
    return str(caught.value)


# What is known before


def test_heads_that_cannot_be_packed_are_refused_by_name(tiny: Tiny) -> None:
    assert "heads of 12 can't be packed" in refusal(tiny("llama_untied"))
    assert "multiples of 8" in refusal(tiny("llama_untied"))


def test_a_model_of_sliding_layers_is_refused(tiny: Tiny) -> None:
    assert "sliding window" in refusal(tiny("mistral"))


def test_sliding_layers_beside_others_are_told_once(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "hybrid", hidden_size=64)
    lines = planned(folder)
    assert sum("sliding" in line for line in lines) == 1
    assert any("layers 1, 2 " in line for line in lines if "sliding" in line)


def test_the_plan_tells_the_bytes_of_the_cache(tiny: Tiny) -> None:
    lines = planned(tiny("qwen3"))
    (line,) = [line for line in lines if "2,048 tokens" in line]
    assert "4,096 tokens" in line
    assert "8,192 tokens" in line
    assert "than at 16 bits" in line


# Errors and the choice


@pytest.fixture
def view(tiny: Tiny) -> ModelView:
    return open_model(str(tiny("llama")))


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(4, len(CANDIDATES), generator=generator).tolist()
    sizes = [[100, 120, 150, 170, 200, 155]] * 3 + [[200, 210, 225, 235, 200, 227]]  # one whose heads copy
    for limit in (500, 580, 655, 700, 900):
        best = min(
            sum(errors[layer][way] for layer, way in enumerate(ways))
            for ways in itertools.product(range(len(CANDIDATES)), repeat=4)
            if sum(row[way] for row, way in zip(sizes, ways, strict=True)) <= limit
        )
        found = choose(errors, sizes, limit)
        assert sum(found.errors) == pytest.approx(best)
        assert found.nbytes <= limit
        assert found.nbytes == sum(row[CANDIDATES.index(bits)] for row, bits in zip(sizes, found.bits, strict=True))
    with pytest.raises(ValueError, match="499 bytes"):
        choose(errors, sizes, 499)


def test_more_salient_tokens_give_less_error(view: ModelView, tmp_path: Path) -> None:
    ids = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(1))
    hidden = ActivationFile(tmp_path / "hidden.bin", (2, 64, view.config.hidden_size))
    before = view.embed_weight()[ids]
    for window in range(2):
        hidden[window] = before[window]
    settings = Recipe.load("zipcache-plus", SMALL).kv
    assert settings is not None
    found = Profile(view, packing_of(settings, 0), torch.device("cpu"), hidden).layer(0, CANDIDATES)
    by_ratio = found[:5]
    assert by_ratio[0] > by_ratio[2] > by_ratio[4] > 0
    assert by_ratio[0] > found[5]  # 4-bit keys help
    layer = view.build_layer(0, view.layer_weights(0))
    expected = run_layer(layer, before, view.position_embeddings(64), None)
    torch.testing.assert_close(torch.stack([hidden[0], hidden[1]]), expected, atol=1e-5, rtol=1e-4)


def test_a_prompt_is_three_quarters_of_a_window() -> None:
    assert [prompt_tokens(n) for n in (4, 64, 2048)] == [3, 48, 1536]


# Whole runs


def test_bits_are_chosen_and_shipped(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    result = run(
        str(tiny("llama")),
        "zipcache-plus",
        out=tmp_path / "out",
        options=RunOptions(set=(*BUDGET, "kv.budget=3.6"), calibration=str(text)),
    )
    kv = result.report["kv"]
    assert len(kv["layers"]) == 3
    assert all(0 < layer["error"] < 1 for layer in kv["layers"])
    sizes = kv["bytes"]["2048"]
    assert sizes["dense"] / sizes["allocated"] >= 3.6
    plan_ = read_plan(result.out)
    assert plan_ is not None
    shipped = [layer.heads[0].kv for layer in plan_.layers]
    assert all(isinstance(bits, KVBits) for bits in shipped)
    assert [(list(bits.high), list(bits.low), bits.ratio) for bits in shipped] == [  # type: ignore[union-attr]
        (layer["high_bits"], layer["low_bits"], layer["ratio"]) for layer in kv["layers"]
    ]


def test_a_choice_is_counted_as_it_is_shipped(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads that copy, whose tokens take 4 bits whatever is chosen for their layer."""
    room = []

    def counted(errors: Any, sizes: Any, limit: int) -> Choice:
        choice = choose(errors, sizes, limit)
        room.append(limit - choice.nbytes)
        return choice

    monkeypatch.setattr("compress.kv.stage.choose", counted)
    options = RunOptions(set=(*BUDGET, "kv.budget=3", "kv.copying_heads=0.4"), calibration=str(text))
    kv = run(str(tiny("llama")), "zipcache-plus", out=tmp_path / "out", options=options).report["kv"]
    sizes = kv["bytes"]["2048"]
    assert int(sizes["dense"] / 3) - sizes["allocated"] == room[0] >= 0


def test_a_looser_budget_has_less_error(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    errors = []
    for budget in (2.5, 3.1, 3.6):
        options = RunOptions(set=(*BUDGET, f"kv.budget={budget}"), calibration=str(text))
        report = run(str(tiny("llama")), "zipcache-plus", out=tmp_path / str(budget), options=options).report
        errors.append(sum(layer["error"] for layer in report["kv"]["layers"]))
    assert errors[0] < errors[1] < errors[2]


def test_bits_are_chosen_for_the_quantized_model(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    sets = ("kv=zipcache-plus", *BUDGET, "kv.budget=3.4")
    both = quick(tiny("llama"), "gptq", tmp_path / "both", text, "weights.bits=2", *sets)
    assert both.report["weights"]["modules"]
    again = run(
        str(quick(tiny("llama"), "gptq", tmp_path / "weights", text, "weights.bits=2", *TEXT).out),
        "zipcache-plus",
        out=tmp_path / "after",
        options=RunOptions(set=(*BUDGET, "kv.budget=3.4"), calibration=str(text)),
    )
    assert [layer["error"] for layer in again.report["kv"]["layers"]] == pytest.approx(
        [layer["error"] for layer in both.report["kv"]["layers"]], rel=1e-3
    )


def test_errors_that_were_measured_are_kept(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    options = RunOptions(set=(*BUDGET, "kv.budget=3.4"), calibration=str(text))
    log = Log(stop=lambda event: type(event).__name__ == "StageStarted" and event.name == "artifact")
    with pytest.raises(InterruptedRunError):
        run(str(tiny("llama")), "zipcache-plus", out=tmp_path / "out", options=options, on_event=log)
    assert len(log.of(LayerDone)) == 3
    log = Log()
    run(str(tiny("llama")), "zipcache-plus", out=tmp_path / "out", options=options, on_event=log)
    assert not log.of(LayerDone)


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (("kv.budget=9",), ["kv.budget=9", "times smaller at 2048 tokens", "up to"]),
        (("kv.budget=3", "calibration.seq_len=20"), ["calibration.seq_len=20", "from 31"]),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(tiny: Tiny, sets: tuple[str, ...], parts: list[str]) -> None:
    text = refusal(tiny("llama"), *BUDGET, *sets)
    assert all(part in text for part in parts), text


def test_packing_has_the_settings_of_the_section() -> None:
    settings = KV(sinks=7, window_bits=16)
    found = packing_of(settings, seed=3)
    assert (found.sinks, found.window_bits, found.seed, found.key_scheme) == (7, 16, 3, "token")
