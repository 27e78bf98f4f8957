"""MoA: its rules, its plans within their budget, what it compares them on, and resuming."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compress.calibrate.errors import InputError
from compress.evalsuite.head import evaluating
from compress.kernels.flash_prefill.reference import flash_prefill
from models import build_model, save_tiny
from runs import InterruptedRunError, Log
from transformers import AutoTokenizer

from compress.events import Message, StepDone
from compress.heads import moa, profiling
from compress.heads.bins import placed
from compress.heads.data import Item
from compress.heads.influence import answer_loss
from compress.heads.layers import Layers
from compress.heads.moa import FULL, STREAM, kept, rule_set, rules_of
from compress.heads.profile import read_profile
from compress.heads.profiling import Subject
from compress.heads.simple_plans import ALL, SOME
from compress.heads.solve import Choice
from compress.pipeline import RunResult, run
from compress.plan import BLOCK, AttentionPlan, Source, Stride, Window, read_plan
from compress.plan_compile import predict_bytes
from compress.plan_writer import PlanWriter, Rule
from compress.schema import Heads
from compress.tap import Seen

SHORT: dict[str, Any] = {
    "method": "moa", "lengths": [320, 384], "items": 1, "sink": 16, "recent": 64, "budget_tokens": 500,
    "prompts": "passkey",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("_no_page")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("moa") / "model")


def compressed(model: Path, out: Path, log: Log | None = None, **heads: Any) -> RunResult:
    return run(str(model), {"name": "test", "heads": {**SHORT, **heads}}, out=out, on_event=log)


# Rules


def test_rules_are_the_grid_once_each() -> None:
    lengths = (1024, 2048, 4096)
    rules = rule_set((1024, 2048), 64, lengths)
    kept = [tuple(min(64 + rule.window.span(n), n) for n in lengths) for rule in rules]
    assert len(set(kept)) == len(kept)
    assert 20 < len(kept) < 6 * 9
    for a in (0, 1024):
        for b in (0.125, 0.5, 0.875):
            near = round((-1024 + 3072 * 2 / 5) / BLOCK) * BLOCK if a == 0 else 2048
            window = Window(near, b, min=BLOCK)
            assert tuple(min(64 + window.span(n), n) for n in lengths) in kept
    assert all(rule.sink == 64 for rule in rules)
    assert min(min(row) for row in kept) >= 64 + BLOCK


def test_rules_of_a_recipe_begin_with_full_attention_and_streaming_heads() -> None:
    rules = rules_of(Heads())
    assert rules[FULL].window.full
    assert rules[STREAM] == Rule(64, Window(512, 0.0))
    assert len(rules) > 20
    assert not any(rule.window.full for rule in rules[1:])


def test_strides_are_rules_besides() -> None:
    plain, rules = rules_of(Heads()), rules_of(Heads(strides=(4, 16)))
    assert rules[:-2] == plain
    assert rules[-2:] == tuple(Rule(64, Window(512, 0.0), Stride(every)) for every in (4, 16))


@pytest.mark.parametrize("length", [200, 320, 321, 500, 2048])
def test_what_a_stride_keeps_is_what_the_runtime_stores(length: int) -> None:
    config, rule = build_model("llama").config, Rule(16, Window(64, 0.0), Stride(3))
    empty = AttentionPlan.empty(config)
    stored, wanted = predict_bytes(empty, config, length).stored, 0
    writer = PlanWriter(empty, Source("moa"))
    for layer in range(3):
        for head in range(2):
            writer.see(layer, head, placed(rule, layer))
            wanted += kept(placed(rule, layer), length)
    assert predict_bytes(writer.finish(), config, length).stored / stored == pytest.approx(wanted / 6 / length)


# Plans


@pytest.fixture(scope="module")
def outcome(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    out = tmp_path_factory.mktemp("plans") / "out"
    return out, compressed(model, out)


def planned(out: Path) -> AttentionPlan:
    found = read_plan(out)
    assert found is not None
    return found


def test_a_plan_keeps_to_its_budget_at_all_lengths(outcome: tuple[Path, RunResult]) -> None:
    out, found = outcome
    plan, config = planned(out), build_model("llama").config
    section = found.report["heads"]
    assert section["constrained"] == [320, 384, 500]
    chosen = next(each for each in section["candidates"] if each["name"] == section["chosen"])
    for length, density in zip((320, 384, 500), chosen["densities"], strict=True):
        stored, dense = (predict_bytes(each, config, length).stored for each in (plan, no_plan()))
        assert stored / dense == pytest.approx(density)
    for each in section["candidates"]:
        assert max(each["densities"]) <= 0.5 + 1e-6
        assert each["name"] in (ALL, SOME) or min(each["densities"]) >= 0.45 - 1e-6
    assert section["retention"] <= 0.5 + 1e-9
    assert plan.sources[0].method == "moa"
    assert plan.budget == {"metric": "kv_bytes", "retention": 0.5, "tokens": 500}
    assert all(len({(head.sink, head.window) for head in layer.heads}) <= 3 for layer in plan.layers)


def test_the_candidate_with_the_least_loss_beyond_the_profile_is_taken(outcome: tuple[Path, RunResult]) -> None:
    section = outcome[1].report["heads"]
    losses = {each["name"]: each["loss"] for each in section["candidates"]}
    assert losses[section["chosen"]] == min(losses.values())
    assert section["compared_at"] == 512  # the model's context, below 1.5 x 384
    assert section["dense_loss"] not in losses.values()


def test_no_plan_loses_to_one_window_or_to_streaming_heads(
    model: Path, tmp_path: Path, outcome: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared with the programme's, and taken where they are better."""
    assert {ALL, SOME} <= {each["name"] for each in outcome[1].report["heads"]["candidates"]}

    def loss(self: Any, choice: Choice | None) -> float:
        return 1.0 if choice is not None and choice.name == ALL else 2.0

    monkeypatch.setattr(moa.Comparison, "loss", loss)
    section = compressed(model, tmp_path / "out").report["heads"]
    assert section["chosen"] == ALL
    assert len({head for layer in planned(tmp_path / "out").layers for head in layer.heads}) == 1


def test_scores_are_the_influence_of_streaming_heads(outcome: tuple[Path, RunResult]) -> None:
    out, _ = outcome
    assert planned(out).scores["moa"] == read_profile(out).scores["influence"]
    assert min(map(min, read_profile(out).scores["influence"])) > 0


def test_the_published_form_has_scores_of_its_own(model: Path, tmp_path: Path, outcome: tuple[Path, RunResult]) -> None:
    compressed(model, tmp_path / "out", elementwise=True)
    (found,) = read_profile(tmp_path / "out").scores.items()
    assert found[0] == "elementwise"
    assert planned(tmp_path / "out").scores["moa"] == found[1]
    assert found[1] != read_profile(outcome[0]).scores["influence"]


def test_heads_that_cost_most_keep_most(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose loss is all there is sees all that the budget allows it."""

    def only_one(of: Any, items: Sequence[Item], rules: Sequence[Rule], published: bool) -> torch.Tensor:
        found = torch.zeros(3, 2, len(rules))
        spans = torch.tensor([rule.window.span(len(items[0].ids)) for rule in rules])
        found[1, 1] = 1 - spans / len(items[0].ids)
        return found

    monkeypatch.setattr(moa, "influence", only_one)
    monkeypatch.setattr(moa.Comparison, "loss", lambda self, choice: 1.0)
    compressed(model, tmp_path / "out")
    assert planned(tmp_path / "out").layers[1].heads[1].window.span(384) == 384


def test_strides_are_chosen_where_they_cost_least_and_shifted_by_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheap(of: Any, items: Sequence[Item], rules: Sequence[Rule], published: bool) -> torch.Tensor:
        strided = torch.tensor([rule.stride is not None or rule.window.full for rule in rules])
        return torch.where(strided, 0.0, 1.0).expand(3, 2, -1)

    monkeypatch.setattr(moa, "influence", cheap)
    found = compressed(model, tmp_path / "out", strides=[3], retention=0.6)
    plan = planned(tmp_path / "out")
    heads = [(n, head) for n, layer in enumerate(plan.layers) for head in layer.heads if head.stride is not None]
    assert {layer for layer, _ in heads} == {0, 1, 2}
    assert all(head.stride == Stride(3, layer) and head.window == Window(64, 0.0) for layer, head in heads)
    section = found.report["heads"]
    chosen = next(each for each in section["candidates"] if each["name"] == section["chosen"])
    for length, density in zip((320, 384, 500), chosen["densities"], strict=True):
        sizes = [predict_bytes(each, build_model("llama").config, length).stored for each in (plan, no_plan())]
        assert sizes[0] / sizes[1] == pytest.approx(density)
        assert density <= 0.6 + 1e-6
    assert "strided" in section["summary"]


def no_plan() -> AttentionPlan:
    return AttentionPlan.empty(build_model("llama").config)


def test_heads_that_copy_are_forced(model: Path, tmp_path: Path) -> None:
    compressed(model, tmp_path / "out", forced=0.34)
    best = [(layer, head) for layer, head, _ in read_profile(tmp_path / "out").ranking("induction")[:2]]
    plan = planned(tmp_path / "out")
    assert all(plan.layers[layer].heads[head].window.full for layer, head in best)


def test_a_budget_that_no_rules_keep_to_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "model", property(lambda _: pytest.fail("the model is loaded")))
    with pytest.raises(InputError, match=r"heads.retention=0.3: .*nearest that can be met is 0\.3\d+"):
        compressed(model, tmp_path / "out", retention=0.3, lengths=[224], recent=64, sink=16)


def test_a_stopped_run_goes_on_where_it_was(model: Path, tmp_path: Path, outcome: tuple[Path, RunResult]) -> None:
    def told(event: object) -> bool:
        return isinstance(event, Message) and "plan of" in event.text

    with pytest.raises(InterruptedRunError):
        compressed(model, tmp_path / "out", Log(stop=lambda event: isinstance(event, StepDone)))
    with pytest.raises(InterruptedRunError):
        compressed(model, tmp_path / "out", second := Log(stop=told))
    assert [event.index for event in second.of(StepDone)] == [1]
    found = compressed(model, tmp_path / "out", third := Log())
    assert not third.of(StepDone)
    assert len([event for event in third.of(Message) if told(event)]) == len(found.report["heads"]["candidates"])
    assert planned(tmp_path / "out").layers == planned(outcome[0]).layers


# What candidates are compared by


def test_prompts_of_both_kinds_are_as_long_as_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the documents are."""
    texts = SimpleNamespace(documents=[f"This is text {number}." for number in range(90)])
    monkeypatch.setattr(profiling, "open_text", lambda _: texts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = Heads(lengths=(384, 480), items=1)
    found = profiling.prompts(Subject(lambda: build_model("llama"), tokenizer, settings))
    assert Counter(item.kind for item in found) == {"passkey": 2, "answered": 2}
    assert [round(len(item.ids), -2) for item in found] == [400, 400, 500, 500]


def test_a_choice_is_applied_to_every_head() -> None:
    """The loss is that with attention replaced by the kernel's reference at the same reach."""
    model = build_model("qwen2")  # two layers slide
    item = Item(
        torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(0)), torch.arange(200) == 198, "", 9
    )
    rules = (Rule(4, Window()), Rule(4, Window(64, 0.0)), Rule(4, Window(0, 0.5)))
    choice = Choice("", ((1, 2),), (), ())
    comparison = moa.Comparison(None, rules, [0])  # type: ignore[arg-type]
    layers = Layers(model)

    def expected(seen: Seen) -> torch.Tensor:
        assert seen.layer == 0
        reach = torch.tensor([[4, 64], [4, 128]])
        return flash_prefill(seen.query, seen.key, seen.value, seen.scaling, reach=reach)[0].transpose(1, 2)

    with evaluating(model), layers.tapped():
        found, by_hand, dense = (
            answer_loss(layers, item, tap) for tap in (comparison.tap(choice, 200), expected, None)
        )
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert found != pytest.approx(dense, rel=1e-5)


def test_strided_heads_see_their_blocks() -> None:
    """Output of a layer with a head of each kind, against masks."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 16, generator=generator) for heads in (6, 3, 3))
    rules = (Rule(4, Window()), Rule(4, Window(64, 0.0)), Rule(4, Window(64, 0.0), Stride(3)))
    tap = moa.Comparison(None, rules, [1]).tap(Choice("", ((2, 0, 1),), (), ()), 300)  # type: ignore[arg-type]
    assert tap is not None
    found = tap(Seen(1, query, key, value, 0.25, lambda: query.transpose(1, 2)))
    row, there = torch.arange(300)[:, None], torch.arange(300)
    near = (there < 4) | (there > row - 64)
    seen = torch.stack([near | (there // BLOCK % 3 == 1), torch.ones_like(near), near]) & (there <= row)
    wide = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *wide, seen.repeat_interleave(2, 0)[None], scale=0.25)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


def test_costs_are_means_by_length(
    outcome: tuple[Path, RunResult], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one length don't count for another."""
    seen: list[torch.Tensor] = []

    def constant(of: Any, items: Sequence[Item], rules: Sequence[Rule], published: bool) -> torch.Tensor:
        return torch.full((3, 2, len(rules)), 2.0 if len(items[0].ids) <= 320 else 5.0)

    def look(problem: Any, names: Any) -> list[Choice]:
        seen.append(torch.tensor(problem.costs))
        return [Choice("sum", ((1, 1),) * 3, (0.0, 0.0), (0.1, 0.1, 0.1))]

    monkeypatch.setattr(moa, "influence", constant)
    monkeypatch.setattr(moa, "candidates", look)
    compressed(model, tmp_path / "out", items=3)
    assert (seen[0][0] == 2).all()
    assert (seen[0][1] == 5).all()
