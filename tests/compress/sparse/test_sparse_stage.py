"""The stage ``sparse``: what it refuses and predicts, and its artifact."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import save_tiny

import compress
from compress.kv.copying import copying_scores
from compress.model import open_model
from compress.pipeline import plan, run
from compress.plan import read_plan
from compress.plan_compile import predict_bytes
from compress.recipe import Recipe
from compress.runtime.plan_cache import PlanCache
from compress.sparse.gate import Heads, gate_of

SHORT: dict[str, Any] = {
    "k": 64,
    "sink": 16,
    "window": 64,
    "dense_layers": 1,
    "gate": 200,
    "measure_tokens": 384,
    "copying_heads": 0.0,
}


def recipe(**sparse: Any) -> dict[str, Any]:
    return {"name": "test", "sparse": {**SHORT, **sparse}}


def refusal(model: Path, more: dict[str, Any] | None = None, **sparse: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan(str(model), {**recipe(**sparse), **(more or {})})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"k": 500}, "sparse.k.*512 at most.*lower sparse.k"),
        ({"dense_layers": 90}, "sparse.dense_layers.*90.*at most"),
        ({"block_q": 20}, "sparse.block_q.*20.*sparse.block_k=8.*sparse.block_q=24"),
        ({"refresh": [8, 16, 2]}, "sparse.refresh"),
        ({"block_k": 12}, "sparse.block_k"),
        ({"method": "hiq"}, "sparse.method.*hip"),
    ],
)
def test_what_cannot_be_is_refused(llama: Path, changed: dict[str, Any], told: str) -> None:
    import re

    assert re.search(told, refusal(llama, **changed))


def test_what_the_packed_cache_keeps_apart_is_seen_by_every_search(llama: Path) -> None:
    told = "is less than what the packed cache keeps apart"
    assert f"sparse.window=64: {told}; allowed: from 256" in refusal(llama, {"kv": {}})
    assert f"sparse.sink=2: {told}" in refusal(llama, {"kv": {"first_flush": 10, "flush": 4, "window_min": 8}}, sink=2)


def test_the_artifact_searches(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(str(llama), recipe(), out=out)
    report = json.loads((out / "report.json").read_text())["sparse"]
    layers = json.loads((llama / "config.json").read_text())["num_hidden_layers"]
    assert [own["layer"] for own in report["layers"]] == list(range(1, layers))
    assert all(own["recall_of_sink_and_window"] < own["recall"] <= 1 for own in report["layers"])
    assert any(line.startswith("sparse   HiP") for line in result.summary)
    found = read_plan(out)
    assert found.search.gate == 200
    assert [layer.heads[0].topk is not None for layer in found.layers] == [n >= 1 for n in range(layers)]
    model, _ = compress.load(out)
    ids = torch.randint(5, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = PlanCache(model.config, model.attention_plan)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    dense = predict_bytes(found, model.config, 300)
    assert cache.nbytes().stored == dense.stored * model.dtype.itemsize // 2


def test_the_heads_that_copy_attend_everything(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(str(llama), recipe(copying_heads=0.4), out=out)
    report = json.loads((out / "report.json").read_text())["sparse"]
    full = [
        [number, index]
        for number, layer in enumerate(read_plan(out).layers)
        for index, head in enumerate(layer.heads)
        if number and head.topk is None
    ]
    heads = sum(len(layer.heads) for layer in read_plan(out).layers[1:])
    assert report["copying_heads"] == full
    assert len(full) == math.ceil(0.4 * heads) == heads - report["heads"]
    scores = copying_scores(open_model(str(llama)), torch.device("cpu"), 0)
    assert min(float(scores[place]) for place in map(tuple, full)) >= max(
        float(scores[layer, head])
        for layer in range(1, len(scores))
        for head in range(scores.shape[1])
        if [layer, head] not in full
    )


def test_heads_that_stream_do_not_search(llama: Path, tmp_path: Path) -> None:
    heads = {"lengths": [384], "items": 1, "sink": 16, "recent": 64, "budget_tokens": 500, "score": "echo"}
    run(str(llama), {**recipe(measure_tokens=0), "heads": heads}, out=tmp_path / "out")
    kinds = {head.kind for layer in read_plan(tmp_path / "out").layers[1:] for head in layer.heads}
    assert kinds == {"stream", "topk"}


def test_a_gate_is_measured_once_and_never_below_what_is_attended(tmp_path: Path, monkeypatch: Any) -> None:
    from compress.sparse import gate

    asked: list[int] = []
    monkeypatch.setattr(gate, "ratio", lambda *args: asked.append(args[3]) or (1.2 if args[3] < 8192 else 0.5))
    sparse = Recipe.load("hip").sparse
    assert sparse is not None
    from compress.plan import TopK
    from compress.sparse.stage import search_of

    told = TopK(64), search_of(sparse), Heads(4, 2, 16)
    assert gate_of(*told, folder=tmp_path) == gate_of(*told, folder=tmp_path) == 8191
    assert asked == [2048, 4096, 8192, 16384]
    fixed = search_of(sparse.model_copy(update={"gate": 5}))
    assert gate_of(told[0], fixed, told[2]) == 128 + 1024 + 64
