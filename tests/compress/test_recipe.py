import re
import subprocess
import sys
import textwrap
from importlib.resources import files

import pytest
from compress.calibrate.errors import InputError

from compress.keys import allowed, comment
from compress.recipe import Recipe, recipe_source
from compress.schema import SECTIONS
from compress.yaml12 import YamlError, inline, parse

SHIPPED = ["gptq", "rsq", "rsq-paper", "rtn"]


def refusal(source, *overrides):
    with pytest.raises(InputError) as caught:
        Recipe.load(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


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


@pytest.mark.parametrize("name", ["gptq", "rsq"])
def test_full_recipes_write_every_key(name):
    content = parse(recipe_source(name))
    assert {section: list(content[section]) for section in SECTIONS} == {
        section: list(model.model_fields) for section, model in SECTIONS.items()
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


# Loading, inheriting, writing back


@pytest.mark.parametrize("name", SHIPPED)
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


def test_to_yaml_leaves_out_an_absent_section():
    text = Recipe.load("rsq", ["eval=null"]).to_yaml()
    assert "eval:" not in text
    assert "weights:" in text


def test_to_yaml_explains_every_key():
    text = Recipe.load("rsq").to_yaml()
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


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("weights.bits=4", 4),
        ("weights.group_size=auto", "auto"),
        ("weights.group_size=-1", -1),
        ("weights.symmetric=false", False),
        ("weights.damp=1e-3", 0.001),
        ("weights.damp=1", 1.0),
        ("weights.untie=no", "no"),
        ("weights.overrides={down_proj: 8}", {"down_proj": 8}),
        ("calibration.source=org/set:config:train:text", "org/set:config:train:text"),
        ("calibration.source=2026-11-22", "2026-11-22"),
        ("calibration.seed=010", 10),
        ("eval.tasks=[piqa, perplexity]", ("piqa", "perplexity")),
        ("eval.tasks=piqa, arc_easy", ("piqa", "arc_easy")),
        ("eval.windows=null", None),
        (" eval.limit = 7", 7),
        ("eval.stride=null", None),
        ("eval.lengths=512,1024", (512, 1024)),
        ("eval.lengths=[512, 1024]", (512, 1024)),
        ("eval.lengths=512", (512,)),
        ("export.formats=compressed-tensors", ("compressed-tensors",)),
    ],
)
def test_override_is_typed_like_yaml(override, value):
    section, key = override.split("=")[0].strip().split(".")
    found = getattr(getattr(Recipe.load("rsq", [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_null_removes_a_section():
    assert Recipe.load("rsq", ["weights.bits=4", "weights.bits=2"]).weights.bits == 2
    assert Recipe.load("rsq", ["eval=null"]).eval is None
    assert Recipe.load("rsq", ["eval=null", "eval.limit=3"]).eval.windows == 24
    assert Recipe.load("rtn", ["calibration.samples=4"]).calibration.samples == 4
    assert Recipe.load("rsq", ["name=mine"]).name == "mine"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("weights.bits", ["--set=weights.bits", "no '='", "weights.bits=4"]),
        ("weigths.bits=3", ["weigths", "no such section", "did you mean 'weights'?"]),
        ("weights.bit=3", ["weights.bit:", "no such key", "did you mean 'bits'?"]),
        ("weights.overrides.down=3", ["weights.overrides.down", "no such key"]),
        ("weights=3", ["weights=3", "is a section", "weights=null"]),
        ("=3", ["no such section"]),
        ("weights.bits=[3", ["--set=weights.bits=[3", "not valid YAML", "line 1"]),
        ("weights.bits=5", ["weights.bits=5", "2, 3, 4, 8"]),
        ("weights.bits=3.5", ["weights.bits=3.5"]),
        ("weights.bits='3'", ["weights.bits=3:"]),
        ("weights.bits=null", ["weights.bits=null", "2, 3, 4, 8"]),
        ("weights.bits=true", ["weights.bits=True"]),
        ("weights.group_size=0", ["weights.group_size=0", "a positive integer, -1, auto"]),
        ("weights.group_size=-2", ["weights.group_size=-2"]),
        ("weights.group_size=atuo", ["did you mean 'auto'?"]),
        ("weights.symmetric=yes", ["weights.symmetric=yes", "true, false"]),
        ("weights.damp=0", ["weights.damp=0", "a number > 0"]),
        ("weights.damp=.nan", ["weights.damp=nan"]),
        ("weights.damp=.inf", ["weights.damp=inf"]),
        ("weights.sweeps=-1", ["weights.sweeps=-1", ">= 0"]),
        ("weights.lm_head_bits=4", ["weights.lm_head_bits=4", "8, 16"]),
        ("weights.rotation=hadamad", ["weights.rotation=hadamad", "did you mean 'hadamard'?"]),
        ("weights.importance=atention", ["did you mean 'attention'?"]),
        ("weights.importance_min=-0.1", ["weights.importance_min=-0.1", ">= 0"]),
        ("weights.importance_min=1", ["weights.importance_min=1.0", "importance_max", "0 <= importance_min < 1"]),
        ("weights.overrides={'(': 4}", ["weights.overrides", "not a regular expression"]),
        ("weights.overrides={a: 5}", ["weights.overrides[a]=5", "2, 3, 4, 8"]),
        ("weights.overrides=4", ["weights.overrides=4", "a mapping"]),
        ("calibration.samples=0", ["calibration.samples=0", ">= 1"]),
        ("calibration.samples=many", ["calibration.samples=many", "an integer >= 1"]),
        ("calibration.seq_len=1", ["calibration.seq_len=1", ">= 2"]),
        ("calibration.seed=-1", ["calibration.seed=-1"]),
        ("calibration.expansion=4096", ["calibration.expansion=4096", "2048 tokens"]),
        ("calibration.source=''", ["calibration.source"]),
        ("export.formats=[gguff]", ["export.formats", "compressed-tensors"]),
        ("export.formats=[]", ["export.formats"]),
        ("eval.tasks=[]", ["eval.tasks"]),
        ("eval.tasks=[3]", ["eval.tasks[0]=3"]),
        ("eval.windows=0", ["eval.windows=0", "an integer >= 1, null"]),
        ("eval.stride=0", ["eval.stride=0", "an integer >= 1, null"]),
        ("eval.lengths=512,many", ["eval.lengths", "many"]),
        ("eval.lengths=[512, 0]", ["eval.lengths[1]=0", ">= 1"]),
        ("eval.lengths=512,512", ["eval.lengths", "twice"]),
        ("eval.depths=0", ["eval.depths=0"]),
    ],
)
def test_bad_override_is_refused_with_key_value_and_way_out(override, parts):
    text = refusal("rsq", override)
    assert all(part in text for part in parts), text


# Keys that exclude each other


@pytest.mark.parametrize(
    ("source", "overrides", "parts"),
    [
        ("rsq", ["weights.method=rtn", "weights.clip=mse"], ["weights.importance=attention", "weights.method=gptq"]),
        ("gptq", ["weights.method=rtn"], ["weights.clip=hessian", "none, mse"]),
        ("rtn", ["weights.method=gptq"], ["weights.method=gptq", "calibration"]),
        ("rsq", ["calibration=null"], ["weights.method=gptq", "calibration"]),
    ],
)
def test_keys_that_exclude_each_other(source, overrides, parts):
    text = refusal(source, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("source", "overrides", "word"),
    [
        ("rsq", ["weights.symmetric=false"], "vLLM"),
        ("rsq", ["weights.bits=4", "weights.symmetric=false", "weights.overrides={down_proj: 2}"], "2 bits"),
        ("rtn", ["weights.sweeps=5"], "weights.sweeps"),
        ("rtn", ["weights.untie=yes"], "larger"),
    ],
)
def test_warnings_name_what_may_surprise(source, overrides, word):
    (warning,) = Recipe.load(source, overrides).warnings()
    assert word in warning


def test_asymmetric_4_bit_is_no_surprise():
    assert Recipe.load("rsq", ["weights.bits=4", "weights.symmetric=false"]).warnings() == []


# Files


def test_unknown_recipe_names_the_nearest_and_all():
    text = refusal("rqs")
    assert "did you mean 'rsq'?" in text
    assert all(name in text for name in SHIPPED)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("weights:\n  bits: [3\n", ["not valid YAML", "line 3"]),
        ("weights:\n  bits: 3\n  bits: 4\n", ["line 3", "'bits' is written twice"]),
        ("? [a]\n: 1\n", ["line 1", "plain word"]),
        ("weights: !!python/object:os.system {}\n", ["not valid YAML", "line 1"]),
        ("- rsq\n", ["mapping of sections"]),
        ("", ["mapping of sections"]),
        ("wieghts: {bits: 3}\n", ["no such section", "did you mean 'weights'?"]),
        ("weights: {bist: 3}\n", ["weights.bist", "did you mean 'bits'?"]),
        ("weights: 3\n", ["weights=3", "a mapping of keys to values"]),
        ("3: x\n", ["no such section"]),
        ("base: rqs\n", ["rqs", "did you mean 'rsq'?"]),
        ("base: [rsq]\n", ["base=['rsq']"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "no such file"]),
        ("base: rsq\nname: 3\n", ["name=3", "not text"]),
    ],
)
def test_bad_file_is_refused(content, parts, tmp_path):
    text = refusal(write(tmp_path, "mine.yaml", content))
    assert all(part in text for part in parts), text


def test_missing_folder_and_binary_files_are_refused(tmp_path):
    assert "no such file" in refusal(str(tmp_path / "x.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "no such file" in refusal(str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    assert "not UTF-8" in refusal(str(tmp_path / "binary.yaml")).replace("isn't", "not")
    (tmp_path / "control.yaml").write_bytes(b"a: \x01")
    assert "not valid YAML" in refusal(str(tmp_path / "control.yaml"))


def test_an_inherited_circle_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: c.yaml\n")
    write(tmp_path, "c.yaml", "base: a.yaml\n")
    assert "a -> b -> c -> a" in refusal(str(tmp_path / "a.yaml"))
    own = write(tmp_path, "own.yaml", "base: own.yaml\n")
    assert "own -> own" in refusal(own)


def test_a_misspelt_key_is_found_even_if_an_override_removes_its_section(tmp_path):
    path = write(tmp_path, "mine.yaml", "base: rsq\neval: {task: [piqa]}\n")
    assert "eval.task" in refusal(path, "eval=null")


def test_source_of_a_path_is_the_file(tmp_path):
    assert recipe_source(write(tmp_path, "mine.yaml", "base: rsq  # why\n")) == "base: rsq  # why\n"


# YAML 1.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("012", 12),
        ("12:30", "12:30"),
        ("~", None),
        ("", None),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1e-3",
        "12:30",
        "2026-11-22",
        "",
        "null",
        "a: b # c",
        "two\nlines",
        "é",
        [1, "a"],
        {"a": 1},
        1e-9,
        -1,
        None,
    ],
)
def test_inline_reads_back(value):
    assert "\n" not in inline(value)
    assert parse(inline(value)) == value


def test_yaml_error_without_a_mark_is_still_one_line():
    with pytest.raises(YamlError) as caught:
        parse("a: \x01")
    assert "\n" not in str(caught.value)


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
