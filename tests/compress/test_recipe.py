"""Recipes: those that are shipped, how they load and inherit, what their keys say."""

import re
import subprocess
import sys
from importlib.resources import files

import pytest
from recipe_builders import SHIPPED, write

from compress.keys import allowed, comment
from compress.recipe import Recipe, recipe_source
from compress.schema import SECTIONS
from compress.yaml12 import parse

# Shipped recipes


def test_shipped_recipes_are_listed_with_a_description():
    assert sorted(Recipe.shipped()) == SHIPPED
    assert all(len(description) > 20 for description in Recipe.shipped().values())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_is_named_like_its_file(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description == Recipe.shipped()[name]
    assert recipe.warnings() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_recipe_carries_the_comment_of_the_schema(name):
    section, above, seen = "", [], 0
    for line in recipe_source(name).splitlines():
        if match := re.match(r"  (\w+):", line):
            assert comment(section, match[1]) in " ".join(above), f"{section}.{match[1]}"
            seen += 1
        above = [*above, line.strip(" #")] if line.strip().startswith("#") else []
        section = line.rstrip(":") if re.fullmatch(r"\w+:", line) else section
    assert seen == sum(len(values) for values in parse(recipe_source(name)).values() if isinstance(values, dict)) > 0


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("gptq", {"heads", "sparse", "kv"}),
        ("rsq", {"heads", "sparse", "kv"}),
        ("heads", {"calibration", "weights", "sparse", "kv"}),
        ("hip", {"calibration", "weights", "heads", "kv"}),
        *((name, {"calibration", "weights", "heads", "sparse"}) for name in ("zipcache", "zipcache-plus")),
    ],
)
def test_full_recipes_write_every_key(name, absent):
    content, absent = parse(recipe_source(name)), {*absent, "share", "act"}
    assert {section: list(content[section]) for section in SECTIONS if section not in absent} == {
        section: list(model.model_fields) for section, model in SECTIONS.items() if section not in absent
    }


def test_rsq_is_gptq_plus_rotation_importance_and_an_8_bit_head():
    rsq, gptq = Recipe.load("rsq"), Recipe.load("gptq")
    differing = {key for key, value in rsq.weights if value != getattr(gptq.weights, key)}
    assert differing == {"rotation", "importance", "lm_head_bits"}
    assert (rsq.weights.rotation, rsq.weights.importance, rsq.weights.lm_head_bits) == ("hadamard", "attention", 8)
    assert (rsq.calibration, rsq.export, rsq.eval) == (gptq.calibration, gptq.export, gptq.eval)


def test_paper_recipe_has_the_settings_of_the_paper():
    recipe = Recipe.load("rsq-paper")
    text, weights = recipe.calibration, recipe.weights
    assert (text.samples, text.seq_len, text.expansion) == (256, 4096, 8)
    assert text.source == "Salesforce/wikitext:wikitext-2-raw-v1:train:text"
    assert (weights.bits, weights.group_size, weights.clip, weights.clip_norm) == (3, -1, "mse", 2.4)
    assert (weights.act_order, weights.sweeps, weights.lm_head_bits) == (False, 0, 16)
    assert (weights.rotation, weights.importance, weights.importance_min) == ("hadamard", "attention", 0.005)


def test_rtn_needs_no_text():
    assert Recipe.load("rtn").calibration is None


def test_the_defaults_of_the_section_kv_are_zipcache_plus():
    assert Recipe.load("zipcache-plus").kv == Recipe.load({"kv": {}}).kv
    assert Recipe.load("zipcache-plus").weights is None


def test_the_defaults_of_the_section_heads_are_the_recipe_heads():
    assert Recipe.load("heads").heads == Recipe.load({"heads": {}}).heads
    assert Recipe.load("heads").weights is None


def test_the_defaults_of_the_section_sparse_are_the_recipe_hip():
    assert Recipe.load("hip").sparse == Recipe.load({"sparse": {}}).sparse


def test_duo_and_moa_differ_from_heads_in_their_method():
    heads = Recipe.load("heads")
    for name in ("duo", "moa"):
        found = Recipe.load(name)
        assert found.heads.method == name
        assert (found.heads.retention, found.heads.sink, found.heads.recent) == (0.5, 64, 256)
        assert found.eval == heads.eval
    assert Recipe.load("duo").heads.prompts == "passkey"


def test_zipcache_has_the_settings_of_the_paper():
    kv = Recipe.load("zipcache").kv
    assert (kv.ratio, kv.high_bits, kv.low_bits, kv.boundary_bits) == (0.6, (4, 4), (2, 2), None)
    assert (kv.key_scheme, kv.value_cst, kv.center, kv.rotate, kv.key_cst, kv.clip) == ("channel", True, *[False] * 4)
    assert (kv.sinks, kv.window_bits, kv.window_min, kv.flush, kv.first_flush) == (0, 16, 0, 100, 1)
    assert (kv.probe_recent, kv.probe_random, kv.probe_cap, kv.normalizer) == (0.05, 0.05, 0, "probes")


# Loading, inheriting, writing back


@pytest.mark.parametrize("name", [name for name in SHIPPED if Recipe.load(name).weights])
def test_to_yaml_reads_back_as_an_equal_recipe(name, tmp_path):
    recipe = Recipe.load(
        name, ["weights.damp=1e-5", r"weights.overrides={'\.down_proj$': 8}", "description='no: a # b'", "eval.text=no"]
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    again = Recipe.load(path)
    assert again == recipe
    assert again.weights.damp == 1e-5
    assert again.weights.overrides == {r"\.down_proj$": 8}
    assert again.eval.text == "no"


@pytest.mark.parametrize("name", ["zipcache", "zipcache-plus"])
def test_a_recipe_of_the_cache_reads_back(name, tmp_path):
    recipe = Recipe.load(name, ["kv.high_bits=[4, 2]", "calibration.samples=2", "kv.budget=5"])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert (recipe.kv.high_bits, recipe.kv.budget) == ((4, 2), 5.0)


def test_to_yaml_leaves_out_an_absent_section():
    text = Recipe.load("rsq", ["eval=null"]).to_yaml()
    assert "eval:" not in text
    assert "weights:" in text


def test_to_yaml_explains_every_key():
    text = Recipe.load("rsq", ["heads=heads", "sparse=hip", "kv=zipcache", "act=act", "share.method=echoatt"]).to_yaml()
    words = " ".join(line.strip(" #") for line in text.splitlines())
    assert all(comment(section, key) in words for section, model in SECTIONS.items() for key in model.model_fields)


def test_base_is_inherited_key_by_key_at_any_depth(tmp_path):
    write(tmp_path, "a.yaml", "base: rsq\nweights: {bits: 4, group_size: 32}\neval: null\n")
    write(tmp_path, "b.yaml", "base: a.yaml\nname: mine\nweights: {group_size: -1}\n")
    recipe = Recipe.load(str(tmp_path / "b.yaml"))
    assert recipe.name == "mine"
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.weights.rotation) == (4, -1, "hadamard")
    assert recipe.eval is None


def test_base_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.yaml", "base: rtn\nweights: {bits: 8}\n")
    child = write(tmp_path / "sub", "b.yaml", "base: ../a.yaml\n")
    monkeypatch.chdir("/")
    assert Recipe.load(child).weights.bits == 8


def test_a_mapping_and_a_recipe_load_like_a_file():
    content = {"base": "rsq", "weights": {"bits": 2}}
    recipe = Recipe.load(content)
    assert recipe.weights.bits == 2
    assert content == {"base": "rsq", "weights": {"bits": 2}}
    changed = Recipe.load(recipe, ["weights.bits=8", "eval=null"])
    assert (changed.weights.bits, changed.eval) == (8, None)
    assert recipe.weights.bits == 2


def test_a_minimal_mapping_gets_the_defaults():
    recipe = Recipe.load({"weights": {"method": "rtn"}})
    assert (recipe.name, recipe.calibration, recipe.eval) == ("custom", None, None)
    assert (recipe.weights.bits, recipe.weights.group_size) == (4, 128)
    assert recipe.export.formats == ("compressed-tensors",)


def test_a_recipe_is_frozen():
    recipe = Recipe.load("rsq")
    with pytest.raises(ValueError, match="frozen"):
        recipe.weights.bits = 4
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "x"


# Descriptions


def test_every_key_says_what_is_allowed():
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"
            assert field.description.endswith("."), f"{section}.{key}"
            assert allowed(field), f"{section}.{key}"


def test_recipe_imports_nothing_heavy_and_recipes_are_package_data():
    code = (
        "import sys, compress.recipe as r; r.Recipe.load('rsq');"
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shipped = files("compress.recipes").iterdir()
    assert sorted(entry.name[:-5] for entry in shipped if entry.name.endswith(".yaml")) == SHIPPED
