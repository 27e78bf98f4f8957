"""Artifacts of models whose layers share: written, refused by transformers, loaded, taken apart, answered fast."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.kernels import native
from runs import distance, quick, stored
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from compress import planning
from compress.artifact.inspect import inspect
from compress.artifact.shared import check_shared, hand_over, taken_up
from compress.job import Estimate, Job
from compress.kv.growing import GrowingCache
from compress.model import ModelFacts
from compress.options import RunOptions
from compress.pipeline import run
from compress.plan import AttentionPlan, Share, Source
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.runtime import load
from compress.runtime.plan_cache import PlanCache
from compress.share.config import MARK
from compress.share.modules import is_shared, share_layers

Tiny = Callable[..., Path]
SHARES = {3: Share("attn", 1, (3, 3, 2, 5, 4, 0)), 4: Share("attn", 1), 5: Share("kv", 2)}
needs_native = pytest.mark.skipif(native.library() is None, reason="the C++ kernels aren't compiled here")

pytestmark = pytest.mark.usefixtures("_no_page")


class Sharing:
    """A stage that lets layers share and changes their output projections, as a refit does; named to be active."""

    name = "export"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        check_shared(recipe)

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        return Estimate([], 0, 0, 0, 0, {})

    def run(self, job: Job) -> None:
        shares = taken_up(job)
        if shares is None:
            model = job.view.load_dense()
            changed(model)
            hand_over(job, model, SHARES)
        writer = PlanWriter(job.plan or AttentionPlan.empty(job.view.config), Source("share"))
        for layer, share in (shares or SHARES).items():
            writer.share(layer, share)
        job.plan = writer.finish()


def changed(model: PreTrainedModel) -> PreTrainedModel:
    share_layers(model, SHARES)
    for layer in SHARES:
        with torch.no_grad():
            model.model.layers[layer].self_attn.o_proj.weight *= 1.1
    return model


@pytest.fixture(scope="module", autouse=True)
def _stage() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        stages = tuple(stage for stage in planning.STAGES if stage.name != "share")
        patch.setattr(planning, "STAGES", (Sharing(), *stages))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("share") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def dense(source: Path) -> Path:
    """The model's own weights, six layers of which three share."""
    return run(str(source), {"name": "sharing"}, out=source.with_name("dense"), options=RunOptions()).out


@pytest.fixture(scope="module")
def packed(source: Path, text: Path) -> Path:
    """The same with packed weights."""
    return quick(source, "rsq", source.with_name("packed"), text, "weights.bits=4", "weights.lm_head_bits=16").out


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **kwargs).logits
    return found


IDS = torch.arange(3, 43)[None]


def test_dropped_weights_are_not_in_the_file(source: Path, dense: Path, packed: Path) -> None:
    before = {name for name in stored(source) if ".self_attn." in name}
    after = {name for name in stored(dense) if ".self_attn." in name}
    gone = {f"model.layers.{n}.self_attn.{p}_proj.weight" for n, own in ((3, "qk"), (4, "qk"), (5, "kv")) for p in own}
    assert before - after == gone
    assert not {name.rpartition(".")[0] for name in stored(packed)} & {name.rpartition(".")[0] for name in gone}
    report = json.loads((dense / "report.json").read_text())
    assert report["artifact"]["shared_layers"] == [3, 4, 5]
    assert report["artifact"]["weight_bytes"] < sum(path.stat().st_size for path in source.glob("*.safetensors"))


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM, AutoConfig])
def test_plain_transformers_refuses_it(kind: Any, dense: Path, packed: Path) -> None:
    for folder in (dense, packed):
        with pytest.raises((ValueError, KeyError), match=r"compress\.load"):
            kind.from_pretrained(str(folder))


def test_the_artifact_is_the_model_that_was_handed_over(source: Path, dense: Path) -> None:
    wanted = changed(AutoModelForCausalLM.from_pretrained(source).eval())
    for kv in (True, False):
        model, tokenizer = load(dense, kv=kv)
        assert is_shared(model)
        assert torch.equal(logits(model, IDS, use_cache=False), logits(wanted, IDS, use_cache=False))
        assert tokenizer("hen").input_ids
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        answer = model.generate(IDS, **options)
        assert isinstance(answer.past_key_values, PlanCache) == kv
        assert answer.sequences.tolist() == wanted.generate(IDS, use_cache=False, **options).sequences.tolist()


def test_packed_layers_share_too_and_are_as_good_as_they_are_dense(packed: Path) -> None:
    model, _ = load(packed)
    plain, _ = load(packed, packed=False)
    assert is_shared(model)
    assert is_shared(plain)
    assert distance(logits(model, IDS), logits(plain, IDS)) < 1e-4


def test_quantization_follows_the_shared_model(source: Path, packed: Path) -> None:
    """The layers behind a sharing one are fitted to what it gives: 8 bits are close to the model handed over."""
    wanted = logits(changed(AutoModelForCausalLM.from_pretrained(source).eval()), IDS)
    found = logits(load(packed, packed=False)[0], IDS)
    assert distance(found, wanted) < 0.6
    report = json.loads((packed / "report.json").read_text())
    modules = [module["name"] for module in report["weights"]["modules"]]
    assert "model.layers.3.self_attn.v_proj" in modules
    assert "model.layers.3.self_attn.q_proj" not in modules
    assert "model.layers.5.self_attn.q_proj" in modules
    assert all(module["relative_error"] < 0.2 for module in report["weights"]["modules"])


@needs_native
@pytest.mark.parametrize("kv", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_token_is_answered_in_fused_steps(kv: bool, batch: int, packed: Path) -> None:
    model, _ = load(packed, kv=kv)
    text = torch.arange(3, 3 + 24 * batch).view(batch, 24)
    mask = torch.ones_like(text)
    mask[-1, : 5 * (batch - 1)] = 0
    whole = logits(model, text, attention_mask=mask, use_cache=False)
    past = PlanCache(model.config, model.attention_plan) if kv else GrowingCache(model.config)
    logits(model, text[:, :20], attention_mask=mask[:, :20], past_key_values=past)
    called: list[int] = []
    kind = type(model.model.layers[0].mlp)
    former = kind.forward
    kind.forward = lambda self, x: called.append(1) or former(self, x)
    try:
        found = [
            logits(model, text[:, n : n + 1], attention_mask=mask[:, : n + 1], past_key_values=past)
            for n in range(20, 24)
        ]
    finally:
        kind.forward = former
    assert not called
    assert distance(torch.cat(found, 1), whole[:, 20:]) < 1e-4
    hooked = model.model.layers[3].register_forward_hook(lambda *_: None)  # a reason for the plain way
    try:
        past.crop(-1)
        again = logits(model, text[:, 23:], attention_mask=mask, past_key_values=past)
    finally:
        hooked.remove()
    assert distance(again, found[-1]) < 1e-4


def test_it_is_inspected_and_refused_where_it_does_not_belong(dense: Path, packed: Path, tmp_path: Path) -> None:
    for folder in (dense, packed):
        lines = inspect(folder).lines()
        assert any("attention: layers 3, 4 take probabilities of layer 1" in line for line in lines)
        assert any("attention: layers 5 take keys and values of layer 2" in line for line in lines)
        assert lines[0].split(": ")[1].startswith("llama,")
    with pytest.raises(InputError, match="its layers share attention already"):
        quick(dense, "rtn", tmp_path / "again", tmp_path)
    card = (dense / "README.md").read_text()
    assert "from_pretrained" not in card
    assert "compress.load" in card


def test_a_folder_without_its_plan_is_not_loaded_wrong(dense: Path, tmp_path: Path) -> None:
    for path in dense.iterdir():
        if path.name not in ("attention_plan.json", "report.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"its layers share attention, and its attention_plan\.json doesn't say which"):
        load(tmp_path)


def test_what_cannot_hold_it_is_refused_first(source: Path, tmp_path: Path, text: Path) -> None:
    for change in ("export.formats=gguf", "weights.tune_epochs=1"):
        with pytest.raises(InputError, match="layers that share attention"):
            quick(source, "rsq", tmp_path / "out", text, change)


def test_kv_bits_leave_shared_layers_alone(source: Path, tmp_path: Path, text: Path) -> None:
    out = quick(source, "rsq", tmp_path / "out", text, "kv=zipcache-plus").out
    model, _ = load(out)
    kept = [sum(head.kv is not None for head in layer.heads) for layer in model.attention_plan.layers]
    assert kept == [2, 0, 0, 0, 0, 0]
    answer = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 44)


def test_a_killed_run_takes_up_what_was_handed_over(source: Path, tmp_path: Path, dense: Path) -> None:
    calls: list[int] = []

    class Killed(Sharing):
        def run(self, job: Job) -> None:
            calls.append(taken_up(job) is None)
            super().run(job)
            if len(calls) == 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "STAGES", (Killed(), *planning.STAGES[1:]))
        with pytest.raises(KeyboardInterrupt):
            run(str(source), {"name": "sharing"}, out=tmp_path / "out", options=RunOptions())
        out = run(str(source), {"name": "sharing"}, out=tmp_path / "out", options=RunOptions()).out
    assert calls == [True, False]
    assert all(
        torch.equal(tensor, load_file(dense / "model.safetensors")[name]) for name, tensor in stored(out).items()
    )
    assert MARK in json.loads((out / "config.json").read_text())
    assert isinstance(load(out)[0], nn.Module)
