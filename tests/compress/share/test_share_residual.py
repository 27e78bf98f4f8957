"""Score residuals: what they compute, their fit, and an artifact that has them."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model, save_tiny
from runs import stored
from torch import Tensor

from compress.kv.growing import GrowingCache
from compress.pipeline import RunResult, run
from compress.plan import AttentionPlan, Residual, Share, read_plan
from compress.plan_compile import compile_plan
from compress.runtime import load
from compress.runtime.plan_cache import PlanCache
from compress.share import sharing, timing
from compress.share.modules import ResidualConsumer, share_layers
from compress.share.refit import fit, targets
from compress.share.residual import fit_scores
from compress.share.trial import Course, Trial

LAYERS = 5
WORDS = ("one", "two", "three", "four", "five", "a", "the", "and", "of", "to", "in", "that", "it", "was")


def tiny(name: str = "llama") -> Any:
    return build_model(name, num_hidden_layers=LAYERS).eval()


def whole(model: Any) -> Residual:
    """All planes of a head as they are, and nothing that is taken."""
    mark = AttentionPlan.empty(model.config).fingerprint
    planes = tuple(range(mark.head_dim // 2))
    return Residual((planes,) * mark.kv_heads, (0.0,) * mark.heads, ((1.0,) * len(planes),) * mark.heads)


def some(model: Any) -> Residual:
    """Two planes of a head, other ones of every KV head, in no order."""
    mark = AttentionPlan.empty(model.config).fingerprint
    last = mark.head_dim // 2 - 1
    planes = tuple((last - head, head) for head in range(mark.kv_heads))
    scale = tuple((0.5 + 0.1 * head, -0.7) for head in range(mark.heads))
    return Residual(planes, tuple(0.3 + 0.1 * head for head in range(mark.heads)), scale)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 300, (2, 21), generator=torch.Generator().manual_seed(0))


def plain_attention(model: Any, ids: Tensor, share: Share, layer: int) -> Tensor:
    """A layer's attention output where its scores are written out, from a dense model's weights."""
    seen: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[index].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.update({index: kwargs["hidden_states"]}), with_kwargs=True
        )
        for index in (share.source, layer)
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(seen[layer], torch.arange(ids.shape[1])[None])

    def turned(index: int, name: str) -> Tensor:
        own = model.model.layers[index].self_attn
        states = getattr(own, name)(seen[index]).unflatten(2, (-1, own.head_dim)).transpose(1, 2)
        half = own.head_dim // 2
        return states * cos[:, None] + torch.cat([-states[..., half:], states[..., :half]], -1) * sin[:, None]

    own = model.model.layers[layer].self_attn
    value = own.v_proj(seen[layer]).unflatten(2, (-1, own.head_dim)).transpose(1, 2)
    theirs, mine = ((turned(index, "q_proj"), turned(index, "k_proj")) for index in (share.source, layer))
    residual, outputs = share.residual, []
    assert residual is not None
    heads, group = len(residual.gain), len(residual.gain) // len(residual.planes)
    for head in range(heads):
        other = head if share.head_map is None else share.head_map[head]
        scores = residual.gain[head] * (theirs[0][:, other] @ theirs[1][:, other // group].transpose(1, 2))
        for plane, scale in zip(residual.planes[head // group], residual.scale[head], strict=True):
            pair = [plane, plane + own.head_dim // 2]
            query, key = mine[0][:, head][..., pair], mine[1][:, head // group][..., pair]
            scores = scores + scale * (query @ key.transpose(1, 2))
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        weights = (scores * own.scaling).masked_fill(~causal, -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, head // group])
    return own.o_proj(torch.cat(outputs, -1))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("mapped", [False, True])
def test_scores_are_the_sum_that_the_plan_describes(name: str, mapped: bool, ids: Tensor) -> None:
    kinds = {"layer_types": ["full_attention"] * LAYERS} if name == "qwen2" else {}
    model = build_model(name, num_hidden_layers=LAYERS, **kinds).eval()
    heads = model.config.num_attention_heads
    head_map = tuple((head + 3) % heads for head in range(heads)) if mapped else None
    share, found = Share("attn", 1, head_map, some(model)), []
    with torch.no_grad():
        wanted = plain_attention(model, ids, share, 3)
        share_layers(model, {3: share})
        model.model.layers[3].self_attn.register_forward_hook(lambda _, args, out: found.append(out[0]))
        model(ids, use_cache=False)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)


def test_all_planes_are_the_layers_own_attention(ids: Tensor) -> None:
    model = tiny()
    share = Share("attn", 1, None, whole(model))
    with torch.no_grad():
        dense = model(ids).logits
        share_layers(model, {3: share, 4: share})
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)


def test_chunks_tokens_and_padding_are_the_whole_text(ids: Tensor) -> None:
    model = tiny()
    share_layers(model, {3: Share("attn", 1, (3, 3, 2, 5, 4, 0), some(model)), 4: Share("attn", 2)})
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    past = GrowingCache(model.config)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[1:, 4:], use_cache=False).logits
        parts, done = [], 0
        for part in ids.split([9, 6, 1, 1, 4], dim=1):
            done += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :done], past_key_values=past).logits)
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[0], together[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 4:], together[1, 4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:, 4:], alone, atol=1e-4, rtol=1e-4)
    assert past.layers[3].keys.shape[-1] == 4
    assert past.layers[3].values.shape[-1] == model.config.head_dim


def fitted_ranks(folder: Path, ranks: tuple[int, ...], damp: float = 1e-6) -> dict[int, tuple[Residual, float, float]]:
    trial, found = Trial(tiny()), {}
    windows = torch.randint(4, 300, (3, 80), generator=torch.Generator().manual_seed(2))
    with trial.at_work():
        course = Course(trial, windows, folder, [1])
        trial.share({3: Share("attn", 1)})
        for rank in ranks:
            found[rank] = fit_scores(trial, course, 3, rank, damp)
    return found


def test_more_planes_fit_better_and_all_of_them_exactly(tmp_path: Path) -> None:
    half = tiny().config.head_dim // 2
    found = fitted_ranks(tmp_path, (2, 4, 2 * half))
    errors = [found[rank][2] for rank in found]
    assert found[2][1] > errors[0] > errors[1] > errors[2]
    assert errors[-1] < 1e-8
    last = found[2 * half][0]
    assert last.planes == (tuple(range(half)),) * len(last.planes)
    assert torch.tensor(last.gain).abs().max() < 1e-3
    torch.testing.assert_close(torch.tensor(last.scale), torch.ones(len(last.gain), half), atol=1e-2, rtol=0)
    assert found[2][0].rank == 2


def test_the_output_is_nearer_to_the_dense_layers(tmp_path: Path) -> None:
    trial = Trial(tiny())
    windows = torch.randint(4, 300, (3, 80), generator=torch.Generator().manual_seed(2))
    after = {}
    with trial.at_work():
        course = Course(trial, windows, tmp_path, [1])
        target = targets(trial, course, 3, tmp_path / "target.bin")
        for rank in (0, 8):
            trial.share({3: Share("attn", 1)})
            if rank:
                own = fit_scores(trial, course, 3, rank, 0.01)[0]
                trial.exchange(3, replace(trial.shares[3], residual=own))
                assert isinstance(trial.attention(3), ResidualConsumer)
            for values in (False, True):
                after[rank, values] = fit(trial, course, 3, target, 0.01, values).after
    assert after[8, False] < after[0, False]
    assert after[8, True] < after[8, False]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("residual")
    (folder / "text.txt").write_text(" ".join(Random(0).choices(WORDS, k=2000)))
    model = save_tiny("llama", folder / "deep", num_hidden_layers=6)
    section = {"check_windows": 2, "protect": 0.0, "pairs": [[3, 2], [4, 2]], "score_rank": 8}
    calibration = {"samples": 6, "seq_len": 144, "source": str(folder / "text.txt")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "WINDOWS", 2)
        patch.setattr(timing, "TURNS", 2)
        content = {
            "name": "test",
            "calibration": calibration,
            "share": section,
            "weights": {"method": "rtn", "group_size": 8},
        }
        return run(str(model), content, out=folder / "out")


def test_an_artifact_has_it_and_is_the_same_in_every_way(made: RunResult) -> None:
    plan = read_plan(made.out)
    assert plan is not None
    assert plan == AttentionPlan.from_json(plan.to_json())
    assert [layer.share.rank for layer in plan.layers if layer.share is not None] == [8, 8]
    model, _ = load(made.out)
    plain, _ = load(made.out, packed=False)
    mark = plan.fingerprint
    assert plain.model.layers[3].self_attn.q_proj.weight.shape == (8 * mark.heads, model.config.hidden_size)
    assert plain.model.layers[3].self_attn.k_proj.weight.shape == (8 * mark.kv_heads, model.config.hidden_size)
    assert any(".3.self_attn.q_proj" in name for name in stored(made.out))
    ids = torch.randint(5, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = PlanCache(model.config, plan)
    with torch.no_grad():
        one, other = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(step[:, -1], one[:, -1], atol=1e-4, rtol=1e-3)
    assert cache.layers[3].keys.shape[-1] == 8
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, **options).tolist() == plain.generate(ids, use_cache=False, **options).tolist()


def test_it_is_counted(made: RunResult) -> None:
    told, plan = made.report["share"], read_plan(made.out)
    assert plan is not None
    mark, shares = plan.fingerprint, {n: layer.share for n, layer in enumerate(plan.layers) if layer.share}
    hidden = mark.head_dim * mark.heads if "hidden_size" not in told else told["hidden_size"]
    width = load(made.out)[0].config.hidden_size
    assert hidden == width
    assert told["dropped_parameters"] == 2 * (mark.heads + mark.kv_heads) * (mark.head_dim - 8) * width
    assert told["cache_share"] == pytest.approx(2 * (1 - 8 / mark.head_dim) / 12, abs=1e-5)
    sizes = compile_plan(plan, 64).layers
    assert sizes[3].nbytes.payload * 2 * mark.head_dim == sizes[0].nbytes.payload * (mark.head_dim + 8)
    for entry in told["layers"]:
        assert entry["score_rank"] == shares[entry["layer"]].rank == 8
        assert entry["score_error_after"] < entry["score_error_before"]
    assert "residual" not in told["layers"][0]


def test_what_does_not_fit_is_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="mode attn"):
        Share("kv", 1, None, whole(tiny()))
    with pytest.raises(ValueError, match="none of them twice"):
        Residual(((1, 1),), (1.0,), ((1.0, 1.0),))
    with pytest.raises(ValueError, match="every query head"):
        Residual(((1,), (2,)), (1.0,), ((1.0,),))
    model = tiny()
    own = some(model)
    with pytest.raises(ValueError, match="planes beyond"):
        share_layers(model, {3: Share("attn", 1, None, replace(own, planes=((99, 1),) * len(own.planes)))})
    normed = build_model("qwen3", num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS)
    with pytest.raises(ValueError, match="norms have no score residual"):
        share_layers(normed, {3: Share("attn", 1, None, whole(normed))})


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama", {"score_rank": 64}, "more than a head has"),
        ("llama", {"score_rank": 3}, "score_rank"),
        ("llama", {"score_rank": 4, "refit": "none"}, "refit"),
        ("llama", {"score_rank": 4, "method": "kvsharer"}, "kvsharer"),
        ("qwen3", {"score_rank": 4}, "norms"),
    ],
)
def test_a_rank_that_cannot_be_is_found_first(name: str, change: dict[str, Any], told: str, tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention"] * LAYERS} if name == "qwen3" else {}
    model = save_tiny(name, tmp_path / "model", num_hidden_layers=LAYERS, **kinds)
    (tmp_path / "text.txt").write_text("one two " * 600)
    calibration = {"samples": 6, "seq_len": 144, "source": str(tmp_path / "text.txt")}
    section = {"check_windows": 2, "protect": 0.0, "pairs": [[3, 2]], **change}
    with pytest.raises(InputError, match=told):
        run(str(model), {"name": "test", "calibration": calibration, "share": section}, out=tmp_path / "out")
