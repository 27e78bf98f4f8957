"""The attention plan: its file, its fingerprint, what goes together, and its bytes."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from pydantic import ValidationError
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from compress.fingerprint import fingerprint_of
from compress.kv.layer import Cluster, PlanLayer
from compress.kv.packed import PackedFormat, PackedPart
from compress.plan import (
    FILE,
    AttentionPlan,
    Calibration,
    Head,
    KVBits,
    Packing,
    Search,
    Share,
    Source,
    Stride,
    TopK,
    Window,
    read_plan,
)
from compress.plan_compile import compile_plan, layer_bytes, packed_bytes, predict_bytes
from compress.plan_order import as_loaded, cluster_order, side_by_side
from compress.plan_writer import PlanWriter, Rule
from compress.runtime.plan_cache import PlanCache

STREAM = Rule(16, Window(a=256, b=0.0))


def config(**changes: Any) -> LlamaConfig:
    settings = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    return LlamaConfig(**(settings | changes))


def writer(method: str = "zipcache", plan: AttentionPlan | None = None) -> PlanWriter:
    return PlanWriter(plan or AttentionPlan.empty(config()), Source(method))


def packed(**changes: Any) -> AttentionPlan:
    own = writer()
    own.packing(Packing(**changes))
    for layer in range(6):
        own.kv(layer, KVBits(ratio=1.0 if layer in (0, 5) else 0.3))
    return own.finish()


def test_file_round_trip(tmp_path: Path) -> None:
    duo = writer("duo", packed())
    duo.see(3, 1, STREAM)
    duo.score([[0.5, 1.0, 0.25]] * 6, profiled=4000)
    plan = duo.finish()
    plan.save(tmp_path)
    assert read_plan(tmp_path) == plan
    content = json.loads((tmp_path / FILE).read_text())
    assert [group["layers"] for group in content["layers"]] == ["0,5", "1-2,4", "3"]
    assert content["writers"] == {"kv": "zipcache", "window": "duo"}
    assert read_plan(tmp_path.parent / "nothing") is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 9}, "version 9; allowed: version 1"),
        ({"packng": 1}, "did you mean 'packing'"),
        ({"packing": {"flush": 0}}, "packing.flush"),
        ({"layers": [{"layers": "0-4", "heads": [{"heads": "0-2"}]}, {"layers": "7", "heads": []}]}, "can't be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        AttentionPlan.from_json(packed().to_json() | change)


def test_text_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match="isn't JSON"):
        read_plan(tmp_path)


def test_a_plan_for_another_model_shows_both_fingerprints() -> None:
    plan = AttentionPlan.empty(config())
    plan.check(config())
    plan.check(config(vocab_size=7))  # attention doesn't depend on it
    with pytest.raises(InputError, match=r"kv_heads differ.*6 query and 3 KV heads.*6 query and 6 KV heads"):
        plan.check(config(num_key_value_heads=6))
    with pytest.raises(InputError, match="rope"):
        plan.check(config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))


def test_window_spans() -> None:
    assert [Window(a=0, b=1.0).span(n) for n in (1, 100)] == [1, 100]
    assert [Window(a=100, b=0.0).span(n) for n in (50, 128, 1000)] == [50, 128, 128]
    assert Window(a=-512, b=0.5).span(4096) == 1536
    assert Window(a=-512, b=0.5, min=64).span(600) == 64
    assert Window(a=0, b=0.5, max=256).span(4096) == 256
    assert [Head(window=w).kind for w in (Window(), Window(a=64, b=0.0), Window(b=0.5))] == [
        "full",
        "stream",
        "elastic",
    ]


def test_parts_belong_to_their_writer() -> None:
    duo = writer("duo")
    duo.see(2, 0, STREAM)
    moa, kivi = writer("moa", duo.finish()), writer("kivi", packed())
    with pytest.raises(InputError, match=r"moa.*'window'.*duo has written"):
        moa.see(2, 1, STREAM)
    with pytest.raises(InputError, match="zipcache has written"):
        kivi.kv(1, KVBits())


@pytest.mark.parametrize("share_mode", ["kv", "attn"])
def test_what_does_not_go_together_names_both_writers(share_mode: Any) -> None:
    duo = writer("duo")
    duo.see(3, 1, STREAM)
    hip = writer("hip", duo.finish())
    hip.topk(3, 1, TopK(k=512))
    with pytest.raises(InputError, match=r"layer 3, KV head 1: far tokens.*topk by hip, window by duo"):
        hip.finish()
    echo = writer("echo", duo.finish())
    echo.share(3, Share(share_mode, 2))
    with pytest.raises(InputError, match=r"layer 3 shares attention.*share by echo, window by duo"):
        echo.finish()
    act = writer("act", packed())
    act.calibrate(2, 0, Calibration(0.4, 0.1))
    with pytest.raises(InputError, match=r"layer 2, KV head 0.*calibration by act, kv by zipcache"):
        act.finish()


def test_a_mask_may_be_shared_between_different_windows() -> None:
    duo = writer("duo")
    duo.see(3, 1, STREAM)
    echo = writer("echo", duo.finish())
    echo.share(3, Share("mask", 2))
    assert echo.finish().layers[3].share == Share("mask", 2)


@pytest.mark.parametrize("mode", ["kv", "attn"])
def test_what_comes_after_sharing_leaves_those_layers_as_they_are(mode: Any) -> None:
    echo = writer("echo")
    echo.share(3, Share(mode, 2, (2, 3, 4, 5, 0, 1)))
    duo = writer("duo", echo.finish())
    for layer in range(6):
        duo.see(layer, 0, STREAM)
    plan = duo.finish()
    assert [layer.heads[0].window == STREAM.window for layer in plan.layers] == [True, True, False, False, True, True]
    assert duo.notes == ["layers 2, 3 share attention (echo) and stay as they are: duo is taken back for them"]
    kivi = writer("kivi", plan)
    kivi.packing(Packing())
    for layer in range(6):
        kivi.kv(layer, KVBits())
    packed_heads = [sum(head.kv is not None for head in layer.heads) for layer in kivi.finish().layers]
    assert packed_heads == [2, 2, 0, 0, 2, 2]
    hip = writer("hip", echo.finish())
    hip.search(Search())
    for layer in range(6):
        hip.topk(layer, 0, TopK(k=512))
    assert [layer.heads[0].topk is not None for layer in hip.finish().layers] == [True, True, False, False, True, True]


def test_lists_are_taken_by_layers_that_search_alike() -> None:
    echo = writer("echo")
    echo.share(3, Share("mask", 2))
    hip = writer("hip", echo.finish())
    hip.search(Search())
    hip.topk(3, 0, TopK(k=512))
    with pytest.raises(InputError, match=r"layer 3 takes the lists of layer 2.*share by echo, topk by hip"):
        hip.finish()
    hip.topk(2, 0, TopK(k=512))
    assert hip.finish().layers[2].heads == hip.finish().layers[3].heads


@pytest.mark.parametrize(("mode", "part"), [("attn", 0.5), ("kv", 0.0), ("mask", 1.0)])
def test_bytes_of_layers_that_share(mode: Any, part: float) -> None:
    echo = writer("echo")
    echo.share(3, Share(mode, 2))
    each = [layer.stored for layer in layer_bytes(echo.finish(), config(), 1000)]
    assert each == [each[0], each[0], each[0], part * each[0], each[0], each[0]]


@pytest.mark.parametrize(
    ("layer", "share", "told"),
    [
        (1, Share("kv", 0), "layers from 2"),
        (3, Share("kv", 3), "isn't before it"),
        (3, Share("kv", 4), "isn't before it"),
        (4, Share("kv", 2), "a chain"),
        (3, Share("attn", 1, (0, 1)), "6 query heads"),
    ],
)
def test_sharing_that_cannot_be(layer: int, share: Share, told: str) -> None:
    own = writer("echo")
    own.share(2, Share("kv", 1))
    with pytest.raises(InputError, match=told):
        own.share(layer, share)


def test_rules_are_for_kv_heads_of_layers_that_attend_to_everything() -> None:
    with pytest.raises(InputError, match="not to query heads"):
        writer("duo").see(2, 4, STREAM)
    with pytest.raises(InputError, match="layer 6 isn't there"):
        writer().kv(6, KVBits())
    sliding = Qwen2Config(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, use_sliding_window=True,
        sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    assert fingerprint_of(sliding).sliding == (2, 3)
    with pytest.raises(InputError, match="sliding window of its own"):
        writer(plan=AttentionPlan.empty(sliding)).kv(2, KVBits())


@pytest.mark.parametrize("first", ["duo", "zipcache"])
def test_heads_that_drop_tokens_stay_at_16_bits_whichever_came_first(first: str) -> None:
    plan, notes = AttentionPlan.empty(config()), []
    for method in (first, "zipcache" if first == "duo" else "duo"):
        own = writer(method, plan)
        if method == "duo":
            own.see(3, 1, STREAM)
            own.see(3, 2, Rule(16, Window(a=0, b=0.5)))
        else:
            own.packing(Packing())
            own.kv(3, KVBits())
        plan = own.finish()
        notes += own.notes
    assert [head.kv is None for head in plan.layers[3].heads] == [False, True, True]
    assert notes == ["2 KV heads that see a window only don't grow with the text and stay at 16 bits"]


HEADS = [{"heads": "0-1"}]
FILE_OF: dict[str, Any] = {
    "version": 1,
    "fingerprint": {"config_hash": "0", "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "rope": "default"},
    "packing": {},
    "layers": [{"layers": "0-2", "heads": [{"heads": "0-1"}]}],
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": [{"layers": "0-1", "heads": [{"heads": "0-1"}]}]}, "has 2 layers, and its fingerprint 3"),
        ({"layers": [{"layers": "0-2", "heads": [{"heads": "0-2"}]}]}, "layer 0 has 3 heads"),
        ({"layers": [{"layers": "0-2", "perm": [0, 0], "heads": [{"heads": "0-1"}]}]}, "isn't an order"),
        ({"layers": [{"layers": "0-2", "share": {"mode": "kv", "source": 2}, "heads": [{"heads": "0-1"}]}]}, "earlier"),
        (
            {
                "layers": [
                    {"layers": "0-1", "heads": HEADS},
                    {"layers": "2", "share": {"mode": "kv", "source": 0, "head_map": [9] * 4}, "heads": HEADS},
                ]
            },
            "head_map",
        ),
        ({"packing": None, "layers": [{"layers": "0-2", "heads": [{"heads": "0-1", "kv": {}}]}]}, "packing isn't"),
        ({"layers": [{"layers": "0-999999999999", "heads": [{"heads": "0-1"}]}]}, "can't be read"),
        ({"layers": [{"layers": "-3", "heads": [{"heads": "0-1"}]}]}, "can't be read"),
        ({"layers": [{"layers": "0-2", "heads": [{"heads": "0,5"}]}]}, "can't be read"),
        ({"layers": ["0-2"]}, "can't be read"),
        ({"layers": None}, "can't be read"),
        ({"layers": [[]]}, "can't be read"),
        ({"fingerprint": None}, "fingerprint"),
        ({"fingerprint": []}, "fingerprint"),
        ({"scores": {"echo": [[1.0, 2.0]]}}, "scores.echo"),
        ({"scores": {"echo": [[float("nan"), 2.0]] * 3}}, "finite"),
        ({"fingerprint": FILE_OF["fingerprint"] | {"sliding": [7]}}, "sliding"),
        ({"fingerprint": FILE_OF["fingerprint"] | {"layers": 0}}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_file_is_checked_against_its_own_fingerprint(change: dict[str, Any], told: str) -> None:
    assert AttentionPlan.from_json(FILE_OF).fingerprint.layers == 3
    with pytest.raises(InputError, match=told):
        AttentionPlan.from_json(FILE_OF | change)


@pytest.mark.parametrize("content", ["[]", "null", '"plan"', "3", "[" * 100_000])
def test_json_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=r"attention_plan.json"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    "write",
    [
        lambda own: own.share(6, Share("kv", 0)),
        lambda own: own.share(3, Share("kv", -1)),
        lambda own: own.share(3, Share("kv", 2, head_map=(0, 1, 2, 3, 4, 6))),
        lambda own: own.kv(9, KVBits()),
        lambda own: own.see(2, -1, STREAM),
        lambda own: own.score([[1.0]]),
    ],
)
def test_layers_and_heads_that_are_not_there_are_refused(write: Any) -> None:
    with pytest.raises((InputError, ValidationError)):
        write(writer())


def test_heads_told_the_same_lie_side_by_side() -> None:
    own = writer("duo")
    own.see(3, 0, STREAM)
    own.see(3, 2, STREAM)
    layer = own.finish().layers[3]
    assert cluster_order(layer) == (1, 0, 2)
    assert cluster_order(AttentionPlan.empty(config()).layers[0]) == (0, 1, 2)
    plan = side_by_side(own.finish(), {2: 8, 3: 32}, columns=96)
    assert [layer.perm for layer in plan.layers] == [None, None, None, (1, 0, 2), None, None]
    assert [head.window.full for head in as_loaded(plan).layers[3].heads] == [True, False, False]
    assert as_loaded(plan).layers[3].perm is None


@pytest.mark.parametrize(("size", "ordered"), [(16, True), (32, True), (48, False), (96, True)])
def test_heads_stay_where_groups_of_columns_are_of_several(size: int, ordered: bool) -> None:
    own = writer("duo")
    own.see(3, 0, STREAM)
    assert (side_by_side(own.finish(), {3: size}, columns=96).layers[3].perm is not None) == ordered


def test_a_config_without_grouped_queries_has_a_fingerprint() -> None:
    mark = fingerprint_of(GPT2Config(n_layer=2, n_head=4, n_embd=32))
    assert (mark.layers, mark.heads, mark.kv_heads, mark.head_dim) == (2, 4, 4, 8)


def test_bits_need_a_packing() -> None:
    own = writer()
    own.kv(2, KVBits())
    with pytest.raises(InputError, match="nobody says how"):
        own.finish()


def test_compiling_gives_arrays_and_clusters() -> None:
    duo = writer("duo", packed())
    duo.see(3, 1, STREAM)
    layer = compile_plan(duo.finish(), 2048).layers[3]
    assert [cluster.heads for cluster in layer.clusters] == [(0, 2), (1,)]
    assert layer.sink.tolist() == [0, 16, 0]
    assert layer.window.tolist() == [2048, 256, 2048]
    assert layer.capacity.tolist() == [2048, 272, 2048]
    assert layer.kernel == "mixed"
    assert compile_plan(duo.finish(), 200).layers[3].capacity.tolist() == [200, 200, 200]
    kinds = [compile_plan(plan, 99).layers[2].kernel for plan in (AttentionPlan.empty(config()), packed())]
    assert kinds == ["dense", "packed"]


def test_more_rules_than_the_runtime_keeps_apart_are_refused() -> None:
    wide = config(num_attention_heads=8, num_key_value_heads=4, hidden_size=128)
    duo = PlanWriter(AttentionPlan.empty(wide), Source("moa"))
    for head in range(4):
        duo.see(2, head, Rule(16, Window(a=64 * (head + 1), b=0.0), Stride(8) if head else None))
    with pytest.raises(InputError, match="layer 2 has 4 different rules at 4096 tokens"):
        compile_plan(duo.finish(), 4096)


@pytest.mark.parametrize("scheme", ["plus", "paper", "all high"])
@pytest.mark.parametrize("length", [40, 255, 256, 700, 2048])
def test_predicted_bytes_are_those_of_the_cache(scheme: str, length: int) -> None:
    packing = Packing.faithful() if scheme == "paper" else Packing(rotate=False)
    bits = KVBits(ratio=1.0 if scheme == "all high" else 0.3)
    layer = PlanLayer(0, [Cluster(None, PackedPart(PackedFormat(packing, bits, 0, None)))])
    states = torch.randn(1, 3, length, 64, generator=torch.Generator().manual_seed(0))
    layer.update(states, states)
    layer.attend(states.repeat_interleave(2, 1), None, 0.125)
    found, predicted = layer.nbytes(), packed_bytes(packing, bits, length, 3, 64)
    for name in ("payload", "stored", "allocated"):
        assert getattr(predicted, name) == pytest.approx(getattr(found, name), rel=0.01)


@pytest.mark.parametrize(
    ("layers", "heads", "width", "length", "ratio"),
    [(32, 8, 128, 2048, 4.98), (32, 8, 128, 4096, 5.1), (30, 3, 64, 2048, 4.3), (30, 3, 64, 4096, 4.6)],
)
def test_zipcache_plus_is_as_small_as_promised(layers: int, heads: int, width: int, length: int, ratio: float) -> None:
    model = config(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * width
    )
    own = PlanWriter(AttentionPlan.empty(model), Source("zipcache"))
    own.packing(Packing())
    for layer in range(layers):
        own.kv(layer, KVBits(ratio=1.0) if layer in (0, layers - 1) else KVBits())
    dense = 4 * layers * heads * width * length
    assert dense / predict_bytes(own.finish(), model, length).allocated >= ratio


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("seed", range(4))
def test_predicted_bytes_of_windows_are_those_of_the_cache(length: int, seed: int) -> None:
    """Sinks and rings, elastic spans, strided blocks, heads that keep everything, in any mixture."""
    draw = Random(seed)
    rules = [
        Rule(0, Window()), STREAM, Rule(4, Window(a=64, b=0.0)), Rule(64, Window(a=-500, b=0.5, min=64)),
        Rule(16, Window(a=0, b=0.25)), Rule(32, Window(a=128, b=0.0), Stride(every=8, phase=3)),
        Rule(0, Window(a=64, b=0.25), Stride(every=3)),
    ]  # fmt: skip
    given = config(head_dim=64)
    own = writer("moa", AttentionPlan.empty(given))
    for layer in range(6):
        for head in range(3):
            own.see(layer, head, draw.choice(rules))
    plan = own.finish()
    cache = PlanCache(given, plan)
    states = torch.zeros(1, 3, length, 64, dtype=torch.float16)
    for layer in cache.layers:
        layer.update(states, states)
        if isinstance(layer, PlanLayer):
            layer.keep()
    found, predicted = cache.nbytes(), predict_bytes(plan, given, length)
    assert predicted.stored == found.stored
    assert predicted.allocated == pytest.approx(found.allocated, rel=0.01)


def test_an_empty_plan_predicts_the_dense_cache() -> None:
    assert predict_bytes(AttentionPlan.empty(config()), config(), 100).allocated == 6 * 3 * 16 * 4 * 100


def test_lines_show_every_head() -> None:
    duo = writer("duo", packed())
    duo.see(3, 1, STREAM)
    lines = duo.finish().lines()
    assert lines[0] == "layers 0            fff  K4V4"
    assert "fSf" in lines[2]


def test_alike_classes_are_one() -> None:
    assert KVBits(high=(4, 4), low=(4, 4), ratio=0.3).ratio == 1.0
    assert replace(KVBits(), ratio=0.5).scored
