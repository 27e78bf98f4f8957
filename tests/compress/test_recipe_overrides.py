"""Overrides of a recipe's keys, and keys that exclude each other."""

import pytest
from recipe_builders import refusal

from compress.options import RunOptions
from compress.recipe import Recipe

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
        ("kv.high_bits=2", (2, 2)),
        ("kv.high_bits=[4, 2]", (4, 2)),
        ("kv.boundary_bits=null", None),
        ("kv.ratio=1", 1.0),
        ("kv.budget=null", None),
    ],
)
def test_override_is_typed_like_yaml(override, value):
    section, key = override.split("=")[0].strip().split(".")
    found = getattr(getattr(Recipe.load("rsq", [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_section_can_be_that_of_another_recipe():
    recipe = Recipe.load("rsq", ["kv=zipcache", "kv.ratio=0.5"])
    assert (recipe.name, recipe.kv.ratio, recipe.kv.key_scheme) == ("rsq", 0.5, "channel")
    assert recipe.weights == Recipe.load("rsq").weights


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
        ("kv=3", ["kv=3", "is a section", "kv=RECIPE"]),
        ("kv=rtn", ["kv=rtn", "without the section 'kv'"]),
        ("kv=zipcach", ["zipcach", "did you mean 'zipcache'?"]),
        ("kv.method=kivi", ["kv.method=kivi", "zipcache"]),
        ("kv.ratio=1.5", ["kv.ratio=1.5", ">= 0 and <= 1"]),
        ("kv.high_bits=3", ["kv.high_bits[0]=3", "2, 4, or a pair"]),
        ("kv.high_bits=[4, 4, 4]", ["kv.high_bits", "2, 4, or a pair"]),
        ("kv.boundary_bits=8", ["kv.boundary_bits", "2, 4", "null"]),
        ("kv.sinks=-1", ["kv.sinks=-1", ">= 0"]),
        ("kv.window_bits=4", ["kv.window_bits=4", "8, 16"]),
        ("kv.flush=0", ["kv.flush=0", ">= 1"]),
        ("kv.budget=1", ["kv.budget=1", "> 1, null"]),
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
        ("zipcache-plus", ["kv.high_bits=2", "kv.low_bits=4"], ["kv.high_bits=[2, 2]", "kv.low_bits=[2, 2]"]),
        ("zipcache-plus", ["kv.key_scheme=channel"], ["kv.center=True", "kv.key_scheme=token"]),
        ("zipcache", ["kv.key_cst=true"], ["kv.key_cst=True", "kv.key_scheme=token"]),
        ("zipcache", ["kv.probe_recent=0.6", "kv.probe_random=0.6"], ["kv.probe_random=0.6", "0 to 0.4"]),
        ("zipcache", ["kv.probe_recent=0", "kv.probe_random=0"], ["kv.probe_recent=0", "kv.ratio=0 or 1"]),
        ("zipcache-plus", ["kv.budget=5"], ["kv.budget=5", "--calibration auto"]),
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


# Options that become overrides


def resolved(source, **options):
    return Recipe.load(source, RunOptions(**options).overrides())


def seeds(recipe):
    return recipe.calibration and recipe.calibration.seed, recipe.eval and recipe.eval.seed


def test_one_seed_is_that_of_everything():
    assert seeds(resolved("rsq")) == (0, 0)
    assert seeds(resolved("rsq", seed=3)) == (3, 3)
    assert seeds(resolved({"base": "rsq", "eval": {"seed": 7}}, seed=3)) == (3, 3)
    assert seeds(resolved("rsq", seed=3, eval_tasks=("passkey",), set=("eval.samples=2",))) == (3, 3)


def test_a_seed_of_the_questions_that_was_given_stays():
    assert seeds(resolved("rsq", seed=3, set=("eval.seed=5", "calibration.seed=6"))) == (3, 5)
    assert seeds(resolved("rsq", seed=3, set=(" eval.seed = 5",))) == (3, 5)


def test_a_seed_does_not_bring_scoring_back():
    assert seeds(resolved("rsq", seed=3, eval_tasks=())) == (3, None)
    assert seeds(resolved("rsq", seed=3, set=("eval=null",))) == (3, None)
    assert seeds(resolved({"base": "rsq", "eval": None}, seed=3)) == (3, None)
    assert seeds(resolved({"base": "rsq", "eval": None}, seed=3, eval_tasks=("passkey",))) == (3, 3)


def test_a_key_only_where_its_section_is():
    assert Recipe.load("rsq", ["eval=null", "eval?.limit=3"]).eval is None
    assert Recipe.load("rsq", ["eval?.limit=3"]).eval.limit == 3
    assert "did you mean 'limit'?" in refusal("rsq", "eval=null", "eval?.limits=3")
    assert "no such section" in refusal("rsq", "eval?=null")
