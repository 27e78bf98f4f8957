"""``compress bench --kv``: bytes of caches that were filled without a model, beside other ways to keep them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from compress.evalsuite.efficiency import allocated
from compress.evalsuite.report import render
from transformers import Cache, DynamicCache, LlamaConfig

from compress.bench_kv import bench_kv, kv_table
from compress.kv.filling import CLOSE, Shape, filled_bytes, match
from compress.kv.schemes import from_settings, named, plan_of, schemes
from compress.plan_compile import predict_bytes
from compress.recipe import Recipe
from compress.schema import KV

LENGTH = 700


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return LlamaConfig(num_hidden_layers=4, intermediate_size=64, **sizes)


@pytest.fixture(scope="module")
def shape(config: LlamaConfig) -> Shape:
    return Shape.of(config)


def settings() -> KV:
    found = Recipe.load("zipcache-plus").kv
    assert found is not None
    return found


def whole(cache: Cache, shape: Shape, sizes: list[int]) -> int:
    """Every layer filled, and what all of it occupies."""
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for tokens in sizes:
            layer.update(*shape.states(tokens, generator))
    return allocated(cache).nbytes


@pytest.mark.parametrize("name", ["dense", "kivi-2", "kivi-4"])
def test_one_layer_of_a_kind_stands_for_all(config: LlamaConfig, shape: Shape, name: str) -> None:
    (scheme,) = named([name], config)
    assert filled_bytes(scheme.make(0), shape, [300, 64]).allocated == whole(scheme.make(0), shape, [300, 64])


def test_a_dense_cache_has_16_bits(config: LlamaConfig, shape: Shape) -> None:
    found = filled_bytes(DynamicCache(config=config), shape, [LENGTH])
    assert found.payload == found.stored == found.allocated == 4 * 2 * LENGTH * 2 * 32 * 2


@pytest.mark.parametrize("name", ["zipcache-plus", "zipcache"])
def test_packed_bytes_are_those_that_were_predicted(config: LlamaConfig, shape: Shape, name: str) -> None:
    kv = Recipe.load(name).kv
    assert kv is not None
    found = filled_bytes(from_settings(name, "", config, kv).make(0), shape, [LENGTH])
    predicted = predict_bytes(plan_of(config, kv), config, LENGTH)
    assert found.allocated == pytest.approx(predicted.allocated, rel=0.01)
    assert found.stored == pytest.approx(predicted.stored, rel=0.01)
    assert found.payload < found.stored < found.allocated < 4 * 2 * LENGTH * 2 * 32 * 2


def test_the_targets_of_allocated_bytes_hold() -> None:
    for heads, width, layers, least in ((8, 128, 32, (4.98, 5.1)), (3, 64, 30, (4.3, 4.6))):
        config = LlamaConfig(
            hidden_size=heads * width, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=layers
        )
        (plus,) = named(["zipcache-plus"], config)
        for length, wanted in zip((2048, 4096), least, strict=True):
            occupied = filled_bytes(plus.make(0), Shape(heads, width), [length]).allocated
            assert 4 * heads * width * layers * length / occupied >= wanted


def test_a_smaller_scheme_is_brought_to_equal_bytes(config: LlamaConfig, shape: Shape) -> None:
    sizes = [LENGTH]
    ours, kivi, four = named(["zipcache-plus", "kivi-2", "uniform-4"], config)
    wanted = filled_bytes(ours.make(0), shape, sizes).allocated
    found = match(kivi, shape, sizes, round(1.3 * wanted))
    assert found.more > 0
    assert found.equal
    assert abs(found.nbytes.allocated / (1.3 * wanted) - 1) <= CLOSE
    assert filled_bytes(kivi.make(found.more), shape, sizes) == found.nbytes
    above = match(four, shape, sizes, wanted)
    assert (above.more, above.equal) == (0, False)


def test_uniform_schemes_store_what_their_names_say(config: LlamaConfig, shape: Shape) -> None:
    numbers = 4 * 2 * LENGTH * 2 * 32
    for name, bits in (("uniform-4", 4), ("uniform-2", 2), ("k4v2", 3)):
        (scheme,) = named([name], config)
        found = filled_bytes(scheme.make(0), shape, [LENGTH])
        params = 4 * 2 * LENGTH * 2 * 4  # layers, keys and values, heads, two float16
        assert found.payload == numbers * bits // 8
        assert found.stored == found.payload + params


def test_schemes_that_are_not_installed_say_so(config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("is_optimum_quanto_available", "is_hqq_available"):
        monkeypatch.setattr(f"compress.kv.schemes.{backend}", lambda: False)
    found = schemes(config)
    assert found["quanto-4"].make is None
    assert found["quanto-4"].missing == "optimum-quanto isn't installed"
    with pytest.raises(InputError, match=r"is not a scheme.*did you mean 'kivi-2'"):
        named(["kivi2"], config)


@pytest.fixture
def artifact(tiny, tmp_path: Path) -> Path:
    """A tiny model's folder with a plan, and as little of a report as is read."""
    folder = tmp_path / "out"
    shutil.copytree(tiny("llama"), folder)
    config = LlamaConfig.from_pretrained(folder)
    plan_of(config, settings()).save(folder)
    return folder


def test_the_command_counts_and_tells(artifact: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(artifact), "--kv", "--lengths", "256,512", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    section = json.loads(done.stdout)
    rows = {(row["scheme"], row["length"]): row for row in section["rows"]}
    assert (section["scheme"], section["heads"], section["width"], section["layers"]) == ("own", 2, 16, 3)
    assert rows["dense", 512]["allocated"] == 3 * 2 * 512 * 2 * 16 * 2
    assert rows["dense", 512]["ratio"] == 1
    assert rows["own", 512] | {"scheme": ""} == rows["zipcache-plus", 512] | {"scheme": "", "equal_tokens": None}
    lines = kv_table(section)
    assert "| 512 | dense | 0.20 MB | 0.20 MB | 0.20 MB | 1.00x |  |" in lines
    assert "no artifact" in done.stderr


def test_a_recipe_stands_for_any_models_cache(tiny) -> None:
    found = bench_kv(str(tiny("qwen3")), "zipcache", (256,))
    assert found["scheme"] == "zipcache"
    assert [row["scheme"] for row in found["rows"]].count("zipcache") == 1
    assert bench_kv(str(tiny("llama")), "zipcache-plus")["rows"][0]["length"] == 512  # its context


def test_sliding_layers_hold_their_window_only(tiny) -> None:
    found = bench_kv(str(tiny("mistral")), "zipcache", (256,))
    rows = {row["scheme"]: row for row in found["rows"]}
    assert rows["dense"]["allocated"] == rows["zipcache"]["allocated"] < 3 * 2 * 16 * 2 * 24 * 2
    with pytest.raises(InputError, match="its heads of 12 can't be packed"):
        bench_kv(str(tiny("qwen2")), "zipcache", (256,))


def test_a_plan_from_a_file(artifact: Path, tiny) -> None:
    plan = artifact / "attention_plan.json"
    assert bench_kv(str(tiny("llama")), str(plan), (256,))["scheme"] == "attention_plan.json"
    assert bench_kv(str(tiny("llama")), str(artifact), (256,))["scheme"] == "out"
    with pytest.raises(InputError, match="was made for another model"):
        bench_kv(str(tiny("qwen3")), str(plan), (256,))


@pytest.mark.parametrize(
    ("kv", "lengths", "message"),
    [
        ("own", None, "has no attention plan.*--kv zipcache-plus"),
        ("zipcache-plus", (4096,), r"--lengths=4096: beyond the context of 512 tokens"),
        ("zipcache-plus", (1,), r"--lengths=1"),
        ("rsq", None, "has no section kv"),
        ("zipcach", None, "^--kv=zipcach: there is no such recipe.*did you mean 'zipcache'"),
    ],
)
def test_what_cannot_be_counted_is_told(tiny, kv: str, lengths: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_kv(str(tiny("llama")), kv, lengths)


def test_the_report_shows_the_schemes(artifact: Path) -> None:
    page = render({"kv_bytes": bench_kv(str(artifact), lengths=(256,))}, "title")
    assert "The cache beside other ways to keep it" in page
    assert "256 tokens: this cache" in page
    assert "256 tokens: kivi-2" in page
    assert "isn&#39;t installed" in page or "isn't installed" in page
