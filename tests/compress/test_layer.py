"""One decoder layer: what is observed in it, and what is quantized against what."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress.calibrate import importance
from compress.calibrate.importance import STRATEGIES, Spread
from compress.calibrate.stream import ActivationFile
from compress.calibrate.workers import Workers
from models import CONFIGS, VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.model import ModelView, open_model, run_layer
from compress.schema import Weights
from compress.weights import layer as module
from compress.weights.gptq import Solution
from compress.weights.layer import Quantized, Streams, Work, quantize_layer, quantize_matrix
from compress.weights.observe import Pieces

Tiny = Callable[[str], Path]
SAMPLES, LENGTH = 3, 20  # longer than the sliding windows
QUICK: dict[str, Any] = {"bits": 4, "group_size": 8, "clip_grid": 4, "sweeps": 1}


class Bench:
    """Layer 0 of a tiny model, its input files filled with the embeddings of random tokens."""

    def __init__(self, model: Path, folder: Path, index: int = 0, **settings: Any) -> None:
        self.view: ModelView = open_model(str(model))
        self.index = index
        self.weights = self.view.layer_weights(index)
        self.linears = self.view.linears(index)
        self.mask = self.view.attention_mask(index, LENGTH)
        self.positions = self.view.position_embeddings(LENGTH)
        ids = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
        counts = torch.bincount(ids.flatten(), minlength=VOCAB)
        chosen = Weights(**(QUICK | settings))
        self.work = Work(chosen, 8, torch.float32, ids, counts, True, torch.device("cpu"), Workers(2))
        widths = {"inputs": self.view.config.hidden_size, "outputs": self.view.config.hidden_size}
        widths |= {"attention": self.linears["o"].in_features, "mlp": self.linears["down"].in_features}
        folder.mkdir(exist_ok=True)
        files = {
            name: ActivationFile(folder / f"{name}.bin", (SAMPLES, LENGTH, width)) for name, width in widths.items()
        }
        self.streams = Streams(**files)
        for i, sample in enumerate(ids):
            self.streams.inputs[i] = self.view.embed_weight()[sample]

    def layer(self) -> nn.Module:
        return self.view.build_layer(self.index, {key: tensor.clone() for key, tensor in self.weights.items()})

    def pieces(self) -> Pieces:
        return Pieces(self.layer(), self.view.family, self.positions, self.mask)

    def quantize(self, pieces: Pieces | None = None, work: Work | None = None) -> list[Quantized]:
        names = {role: fact.name for role, fact in self.linears.items()}
        window = self.view.window(self.index)
        return quantize_layer(pieces or self.pieces(), self.streams, work or self.work, names, window)


def inputs_of(layer: nn.Module, bench: Bench) -> dict[str, Tensor]:
    """What every linear layer of a plain transformers layer reads, ``[samples * T, in]``, by hooks."""
    seen: dict[str, list[Tensor]] = {role: [] for role in bench.linears}

    def keep(role: str) -> Callable[..., None]:
        return lambda _, args: seen[role].append(args[0].flatten(0, 1))

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(keep(role))
        for role, name in bench.view.family.roles.items()
    ]
    for i in range(SAMPLES):
        run_layer(layer, bench.streams.inputs[i].unsqueeze(0), bench.positions, bench.mask)
    for hook in hooks:
        hook.remove()
    return {role: torch.cat(parts) for role, parts in seen.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pieces_are_the_whole_layer(tiny: Tiny, tmp_path: Path, name: str) -> None:
    bench = Bench(tiny(name), tmp_path)
    pieces, hidden = bench.pieces(), bench.streams.inputs[0]
    expected = run_layer(bench.layer(), hidden.unsqueeze(0), bench.positions, bench.mask)[0]
    torch.testing.assert_close(pieces.whole(hidden), expected)
    with pieces.without("o"):
        read_by_o = pieces.attention_output(pieces.attention_input(hidden))
    middle = hidden + pieces.linear("o")(read_by_o)
    with pieces.without("down"):
        read_by_down = pieces.mlp_output(pieces.mlp_input(middle))
    found = middle + pieces.linear("down")(read_by_down)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pieces.whole(hidden), expected)  # and the layer is whole again


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_what_transformers_attends(tiny: Tiny, tmp_path: Path, name: str, index: int) -> None:
    bench = Bench(tiny(name), tmp_path, index, importance="attention")
    model = AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation="eager")
    with torch.no_grad():
        answer = model(bench.work.ids, output_attentions=True, output_hidden_states=True)
    received = answer.attentions[index].sum((1, 2))
    for i in range(SAMPLES):
        expected = importance.weights(received[i], Spread())
        hidden = answer.hidden_states[index][i]
        pieces = bench.pieces()
        with pieces.without("o"):
            found = module._importance(pieces, hidden, bench.work, i, bench.view.window(index))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strategy", ["none", "act_norm"])
def test_layers_are_quantized_in_sequence(tiny: Tiny, tmp_path: Path, name: str, strategy: str) -> None:
    """The finished layer gives the outputs, and every module was judged by the inputs that it now really has."""
    bench = Bench(tiny(name), tmp_path, importance=strategy)
    pieces = bench.pieces()
    done = bench.quantize(pieces)
    assert [part.name for part in done] == [bench.linears[role].name for role in bench.linears]
    finished = bench.layer()
    for role, part in zip(bench.linears, done, strict=True):
        weight = part.solution.dequantized()
        assert torch.equal(weight, pieces.linear(role).weight)
        finished.get_submodule(bench.view.family.roles[role]).weight.copy_(weight)  # type: ignore[union-attr,operator]
    for i in range(SAMPLES):
        expected = run_layer(finished, bench.streams.inputs[i].unsqueeze(0), bench.positions, bench.mask)[0]
        torch.testing.assert_close(bench.streams.outputs[i], expected, rtol=1e-4, atol=1e-4)
    spread = torch.ones(SAMPLES * LENGTH)
    if strategy == "act_norm":
        spread = torch.cat([importance.weights(importance.act_norm(x), Spread()) for x in bench.streams.inputs._data])
    for (role, x), part in zip(inputs_of(finished, bench).items(), done, strict=True):
        dense = bench.weights[f"{bench.view.family.roles[role]}.weight"]
        x = x * spread.sqrt().unsqueeze(1)
        error = ((dense - part.solution.dequantized()) @ x.t()).square().sum() / (dense @ x.t()).square().sum()
        assert part.relative_error == pytest.approx(float(error), rel=1e-2), role
        assert 0 < part.relative_error < 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_sees_its_own_sample(tiny: Tiny, tmp_path: Path, strategy: str) -> None:
    bench = Bench(tiny("llama"), tmp_path, importance=strategy, importance_power=2.0)
    ids, inputs = bench.work.ids, bench.streams.inputs
    for i in range(SAMPLES):
        output = run_layer(bench.layer(), inputs[i].unsqueeze(0), bench.positions, bench.mask)[0]
        raw = {
            "act_norm": lambda x: importance.act_norm(x),
            "act_diff": lambda x, y=output: importance.act_diff(x, y),
            "token_freq": lambda _, t=ids[i]: torch.tensor([-float((ids == token).sum()) for token in t]),
            "token_sim": lambda x: importance.token_sim(x),
            "first_n": lambda _: importance.first_n(LENGTH),
            "first_last_n": lambda _: importance.first_last_n(LENGTH),
        }
        pieces = bench.pieces()
        with pieces.without("o") if strategy == "attention" else nullcontext():
            found = module._importance(pieces, inputs[i], bench.work, i, None)
        assert float(found.mean()) == pytest.approx(1.0, abs=1e-5)
        assert float(found.max()) > 1.1
        if strategy in raw:
            expected = importance.weights(raw[strategy](inputs[i]), Spread(power=2.0))  # type: ignore[operator]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_importance_changes_the_codes(tiny: Tiny, tmp_path: Path) -> None:
    codes = {}
    for strategy in ("none", *STRATEGIES):
        done = Bench(tiny("llama"), tmp_path / strategy, importance=strategy, bits=3).quantize()
        codes[strategy] = torch.cat([part.solution.codes.flatten() for part in done]).numpy().tobytes()
    assert len(set(codes.values())) == len(codes)


def test_equal_scores_are_plain_gptq_to_the_bit(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Bench(tiny("qwen3"), tmp_path / "plain", importance="none").quantize()
    monkeypatch.setattr(importance, "act_norm", lambda x: torch.full((len(x),), 0.3))
    equal = Bench(tiny("qwen3"), tmp_path / "equal", importance="act_norm").quantize()
    for one, other in zip(plain, equal, strict=True):
        assert torch.equal(one.solution.codes, other.solution.codes)
        assert torch.equal(one.solution.scales.scale, other.solution.scales.scale)
        assert one.relative_error == other.relative_error


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_threads_changes_no_bit(tiny: Tiny, tmp_path: Path, count: int) -> None:
    found = []
    for folder, workers in (("two", 2), ("other", count)):
        bench = Bench(tiny("llama"), tmp_path / folder, importance="attention")
        done = bench.quantize(work=replace(bench.work, workers=Workers(workers)))
        found.append([part.solution.codes.numpy().tobytes() for part in done])
        found[-1].append((tmp_path / folder / "outputs.bin").read_bytes())
    assert found[0] == found[1]


def test_overrides_split_a_stack_by_width(tiny: Tiny, tmp_path: Path) -> None:
    overrides = {r"layers\.0\.self_attn\.v_proj": 8, "down_proj$|v_proj": 2}  # the first that matches wins
    done = Bench(tiny("llama"), tmp_path, overrides=overrides).quantize()
    plain = Bench(tiny("llama"), tmp_path / "plain").quantize()
    assert [part.bits for part in done] == [4, 4, 8, 4, 4, 4, 2]
    for part, same in zip(done[:2], plain[:2], strict=True):
        assert torch.equal(part.solution.codes, same.solution.codes)
    assert done[2].relative_error < plain[2].relative_error / 10
    assert int(done[2].solution.codes.abs().max()) > 7
    assert int(done[6].solution.codes.abs().max()) <= 2


def test_one_scale_a_row(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("mistral"), tmp_path)
    done = bench.quantize(work=replace(bench.work, group_size=-1))
    for part, fact in zip(done, bench.linears.values(), strict=True):
        assert part.solution.scales.scale.shape == (fact.out_features, 1)
        assert part.solution.dequantized().shape == (fact.out_features, fact.in_features)


def test_without_calibration_no_hessian_is_formed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gram", lambda *_: pytest.fail("a Hessian was formed"))
    bench = Bench(tiny("llama"), tmp_path, method="rtn")
    done = bench.quantize(work=replace(bench.work, measured=False))
    assert all(part.relative_error != part.relative_error for part in done)
    assert all(not part.solution.note for part in done)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_inputs_are_rounded_to_nearest_with_a_note(value: float) -> None:
    work = SimpleNamespace(settings=Weights(**QUICK, clip="hessian"), group_size=8, dtype=torch.float32)
    settings = Work.solver(work, 4, 16)  # type: ignore[arg-type]
    hessian = torch.eye(16, dtype=torch.float64)
    hessian[2, 2] = value
    solution: Solution = quantize_matrix(torch.randn(4, 16), hessian, settings, "gptq")
    assert solution.note == "its calibration inputs hold NaN or infinity: rounded to nearest"
    assert torch.isfinite(solution.dequantized()).all()
