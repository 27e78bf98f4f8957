"""End-to-end tuning: its gradient, what it gains, and that it can be interrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.calibrate.workers import Workers
from runs import InterruptedRunError, Log, digest, options, quick
from safetensors.torch import load_file

from compress.events import Message, StageDone, StepDone
from compress.model import open_model
from compress.pipeline import run
from compress.recipe import Recipe
from compress.runtime import load
from compress.weights.learned import BETAS, Learned, rate_at
from compress.weights.tuning import Parts, Tuner
from compress.weights.tuning_run import held_out_windows

Tiny = Callable[[str], Path]
TUNED = ("weights.tune_epochs=3", "weights.tune_lr=0.01", "calibration.samples=5", "weights.bits=2")


class Kept(Log):
    """Stops a run when the layers are done, and leaves its files for a closer look."""

    def __init__(self) -> None:
        super().__init__(lambda event: type(event) is StageDone and event.name == "weights")


@pytest.fixture(params=["llama", "qwen2", "llama_untied"])
def tuner(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path, text: Path) -> Tuner:
    """The quantized model of an interrupted run beside the dense one, on two windows of random tokens."""
    model = tiny(request.param)
    sets = ("weights.bits=3", "weights.lm_head_bits=8")
    with pytest.raises(InterruptedRunError):
        quick(model, "rsq", tmp_path / "out", text, *sets, log=Kept())
    view, folder = open_model(str(model)), tmp_path / "out.partial"
    layers = sorted(folder.glob("layer-*.safetensors"))
    names = [name for path in layers for name in load_file(path) if name.endswith(".weight_packed")]
    bits = {name.removesuffix(".weight_packed"): 3 for name in names} | {view.family.head: 8}
    parts = Parts(layers, folder / "embed.safetensors", folder / "norm.safetensors", folder / "head.safetensors", bits)
    ids = torch.randint(view.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    made = Tuner(view, parts, torch.device("cpu"), Workers(2), tmp_path, ids, batch=2)
    made.teach()
    return made


def test_the_targets_are_the_dense_model(tuner: Tuner) -> None:
    dense = tuner.view.load_dense()
    with torch.no_grad():
        expected = dense(tuner.ids).logits
    found = torch.stack([tuner.targets[i] @ tuner.dense_head.t() for i in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_slope(tuner: Tuner) -> None:
    """What a step hands to Adam, against the difference of two losses, for tensors of every kind."""
    learned = Learned.zeros(tuner.shapes())
    tuner.step(learned, [0, 1], rate=0.0)
    names = [
        next(name for name in learned.d if name.endswith(ending))
        for ending in ("q_proj.weight_scale", "down_proj.weight_scale", "input_layernorm.weight", "norm.weight")
    ]
    for name in {*names, tuner.norm_name}:
        gradient = learned.first[name] / (1 - BETAS[0])
        direction = gradient / gradient.norm()
        losses = []
        for sign in (1, -1):
            moved = Learned.zeros(tuner.shapes())
            moved.d[name] += sign * 1e-2 * direction
            losses.append(tuner.divergence(moved, range(2)))
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_the_number_of_threads_changes_nothing(tuner: Tuner) -> None:
    found = []
    for count in (1, 2):
        tuner.workers = Workers(count)
        learned = Learned.zeros(tuner.shapes())
        tuner.step(learned, [1, 0], rate=1e-3)
        found.append(learned.d)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2"])
def test_tuning_comes_nearer_to_the_dense_model(tiny: Tiny, tmp_path: Path, text: Path, model: str) -> None:
    found = quick(tiny(model), "rsq", tmp_path / "out", text, *TUNED)
    tuning = found.report["weights"]["tuning"]
    assert tuning["steps"] == 6
    assert tuning["kl_by_epoch"][-1] < tuning["kl_by_epoch"][0]
    assert tuning["kept"] == (tuning["held_out"]["kl_after"] < tuning["held_out"]["kl_before"])
    assert load(tmp_path / "out") is not None


def test_what_is_stored_is_what_was_tuned(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    """Codes stay, scales and norms move, and they move in the artifact."""
    plain = quick(tiny("llama"), "rsq", tmp_path / "plain", text, *TUNED, "weights.tune_epochs=0").out
    tuned = quick(tiny("llama"), "rsq", tmp_path / "tuned", text, *TUNED, "calibration.samples=1").out
    before, after = load_file(plain / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    again = quick(
        tiny("llama"), "rsq", tmp_path / "again", text, *TUNED, "calibration.samples=1", "weights.tune_epochs=0"
    )
    same = load_file(again.out / "model.safetensors")
    for name, tensor in same.items():
        learnt = name.endswith(("layernorm.weight", "model.norm.weight")) or (
            name.endswith(".weight_scale") and "lm_head" not in name
        )
        assert torch.equal(tensor, after[name]) != learnt, name


@pytest.mark.parametrize("step", [0, 2, 5])
def test_an_interrupted_tuning_goes_on(tiny: Tiny, tmp_path: Path, text: Path, step: int) -> None:
    expected = digest(quick(tiny("llama"), "rsq", tmp_path / "whole", text, *TUNED).out)
    stop = Log(lambda event: type(event) is StepDone and event.index == step)
    with pytest.raises(InterruptedRunError):
        quick(tiny("llama"), "rsq", tmp_path / "out", text, *TUNED, log=stop)
    log = Log()
    out = quick(tiny("llama"), "rsq", tmp_path / "out", text, *TUNED, log=log).out
    assert digest(out) == expected
    assert [event.index for event in log.of(StepDone)] == list(range(step + 1, 6))


def test_what_does_not_help_is_not_kept(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    log = Log()
    wild = quick(tiny("llama"), "rsq", tmp_path / "wild", text, *TUNED, "weights.tune_lr=3", log=log)
    plain = quick(tiny("llama"), "rsq", tmp_path / "plain", text, *TUNED, "weights.tune_epochs=0")
    assert wild.report["weights"]["tuning"]["kept"] is False
    assert any("the solver's scales stay" in event.text for event in log.of(Message))
    assert digest(wild.out) == digest(plain.out)


def test_tuning_needs_text() -> None:
    with pytest.raises(InputError, match=r"weights\.tune_epochs.*calibration"):
        Recipe.load("rtn", ["weights.tune_epochs=1"])


def test_asymmetric_and_overridden_widths(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    sets = (*TUNED, "weights.bits=4", "weights.symmetric=false", "weights.lm_head_bits=16", "weights.tune_lr=1e-3")
    found = run(str(tiny("qwen3")), "rsq", out=tmp_path / "out", options=options("rsq", text, *sets))
    assert found.report["weights"]["tuning"]["kl_by_epoch"][-1] < found.report["weights"]["tuning"]["kl_by_epoch"][0]


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 20, 1.0) for step in range(20)]
    assert rates[0] < rates[3] > rates[10] > rates[19] > 0


@pytest.mark.parametrize(("windows", "held"), [(1, 0), (2, 1), (16, 1), (128, 8)])
def test_some_windows_are_held_out(windows: int, held: int) -> None:
    assert held_out_windows(windows) == held
