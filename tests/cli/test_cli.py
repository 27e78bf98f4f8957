"""The commands as a user meets them; what they call is replaced by stand-ins that record their arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import COMMANDS, main

from compress import __version__
from compress.events import LayerDone, StageStarted
from compress.options import EvalOptions, GenerateOptions, RunOptions, ServeOptions
from compress.recipe import Recipe, recipe_source

PLAN = SimpleNamespace(lines=lambda: ["30 layers", "2.1 x smaller"], to_json=lambda: {"layers": 30})


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module with the given functions in the place of ``compress.x``; every call is recorded."""

    def install(name, **functions):
        calls = []

        def recording(function):
            def call(*args, **kwargs):
                calls.append(SimpleNamespace(args=args, **kwargs))
                return function(*args, **kwargs)

            return call

        module = ModuleType(name)
        for key, function in functions.items():
            setattr(module, key, recording(function))
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


@pytest.fixture
def pipeline(stand_in):
    def run(model, recipe, *, out, options, on_event):
        on_event(StageStarted("weights", 2))
        on_event(LayerDone(0, 2, 1.5))
        out = out or Path("out/m-W3-g64")
        return SimpleNamespace(ok=True, out=out, url=None, summary=["done"], report={"ppl": 30.5})

    return stand_in("compress.pipeline", run=run, plan=lambda *args: PLAN)


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def refused(*arguments):
    """The line on stderr of a call that must fail with exit code 2 and print nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


# The group


def test_help_lists_the_commands_with_a_whole_sentence():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        (line,) = [line for line in result.output.splitlines() if line.strip().startswith(f"{name} ")]
        assert line.endswith(".")
        assert not line.endswith("...")


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS], ("recipes", "show")])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from compress.cli.main import main\n"
        "try: main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version():
    assert __version__ in invoke("--version").output


def test_mistyped_command_names_the_nearest():
    assert "rnu: there is no such command" in refused("rnu")
    assert "did you mean 'run'?" in refused("rnu")


@pytest.mark.parametrize("command", ["run", "plan", "eval", "generate"])
def test_mistyped_option_names_the_nearest(command):
    assert "--device" in refused(command, "--devcie", "cpu")


def test_input_error_is_one_line_and_exit_2(stand_in):
    def fail(*args):
        raise InputError("--model", "nowhere", "there is no such model", fix="give a folder")

    stand_in("compress.pipeline", plan=fail, run=fail)
    stderr = refused("plan", "-m", "nowhere", "-r", "rsq")
    assert stderr == "error: --model=nowhere: there is no such model; give a folder\n"


def test_other_errors_are_not_hidden(stand_in):
    def fail(*args):
        raise ValueError("a bug")

    stand_in("compress.pipeline", plan=fail, run=fail)
    assert isinstance(invoke("plan", "-m", "m", "-r", "rsq").exception, ValueError)


@pytest.mark.parametrize(("command", "hint"), [("run", True), ("plan", False)])
def test_interrupt_is_one_line_and_exit_130(stand_in, command, hint):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    stand_in("compress.pipeline", run=interrupt, plan=interrupt)
    result = invoke(command, "-m", "m", "-r", "rsq")
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted")
    assert len(result.stderr.splitlines()) == 1
    assert ("same command" in result.stderr) is hint


# run and plan


def test_run_hands_over_the_resolved_recipe_and_every_option(pipeline, tmp_path):
    arguments = ["run", "--model", "m", "--recipe", "rsq", "--out", str(tmp_path / "o"), "--set", "weights.bits=4"]
    arguments += [
        "--set",
        "eval.limit=5",
        "--calibration",
        "a:b.jsonl",
        "--eval",
        "piqa,arc_easy",
        "--fresh",
        "--seed",
        "7",
    ]
    arguments += ["--device", "cuda:1", "--task-path", str(tmp_path), "--trust-remote-code"]
    arguments += ["--push", "jane/m", "--public"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    (call,) = pipeline
    model, recipe = call.args
    assert model == "m"
    assert isinstance(recipe, Recipe)
    assert (recipe.weights.bits, recipe.eval.limit, recipe.calibration.seed) == (4, 5, 7)
    assert (recipe.calibration.source, recipe.eval.tasks) == ("a:b.jsonl", ("piqa", "arc_easy"))
    assert recipe.eval.task_path == str(tmp_path)
    assert call.out == tmp_path / "o"
    assert call.options == RunOptions(
        set=("weights.bits=4", "eval.limit=5"),
        calibration="a:b.jsonl",
        eval_tasks=("piqa", "arc_easy"),
        task_path=tmp_path,
        resume=False,
        device="cuda:1",
        seed=7,
        trust_remote_code=True,
        dry_run=False,
        push="jane/m",
        public=True,
    )


def test_run_defaults_are_those_of_the_options(pipeline):
    assert invoke("run", "-m", "m", "-r", "rsq").exit_code == 0
    assert pipeline[0].options == RunOptions()
    assert pipeline[0].args[1] == Recipe.load("rsq")
    assert pipeline[0].out is None


def test_run_prints_the_result_on_stdout_and_progress_on_stderr(pipeline):
    result = invoke("run", "-m", "m", "-r", "rsq")
    assert result.stdout == "done\n"
    assert "layer 1/2 done" in result.stderr


def test_run_json_is_all_there_is_on_stdout(pipeline):
    result = invoke("run", "-m", "m", "-r", "rsq", "--json")
    assert json.loads(result.stdout) == {"ok": True, "out": "out/m-W3-g64", "url": None, "report": {"ppl": 30.5}}


def test_run_that_misses_its_gate_exits_1_after_its_summary(stand_in):
    failed = SimpleNamespace(ok=False, out=Path("o"), url=None, summary=["too bad"], report={})
    stand_in("compress.pipeline", run=lambda *args, **kwargs: failed, plan=lambda *args: PLAN)
    result = invoke("run", "-m", "m", "-r", "rsq")
    assert result.exit_code == 1
    assert result.stdout == "too bad\n"


@pytest.mark.parametrize("arguments", [("run", "--dry-run"), ("plan",)])
def test_plan_and_dry_run_print_the_plan(pipeline, arguments):
    result = invoke(*arguments, "-m", "m", "-r", "rtn", "--set", "weights.bits=8")
    assert result.stdout == "30 layers\n2.1 x smaller\n"
    (call,) = pipeline
    model, recipe, options = call.args[:3]
    assert (model, recipe.weights.bits, options.dry_run) == ("m", 8, True)
    assert json.loads(invoke(*arguments, "-m", "m", "-r", "rtn", "--json").stdout) == {"layers": 30}


def test_eval_none_switches_scoring_off(pipeline):
    invoke("run", "-m", "m", "-r", "rsq", "--eval", "none")
    assert pipeline[0].args[1].eval is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-r", "rsq"], ["--model"]),
        (["-m", "m"], ["--recipe"]),
        (["-m", "m", "-r", "rqs"], ["--recipe=rqs", "did you mean 'rsq'?"]),
        (["-m", "m", "-r", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["-m", "m", "-r", "rsq", "--set", "weights.bit=3"], ["weights.bit", "did you mean 'bits'?"]),
        (["-m", "m", "-r", "rsq", "--set", "weights.bits"], ["--set", "no '='"]),
        (["-m", "m", "-r", "rsq", "--set", "weights.bits=5"], ["weights.bits=5", "2, 3, 4, 8"]),
        (["-m", "m", "-r", "rsq", "--device", "gpu"], ["--device=gpu", "cuda"]),
        (["-m", "m", "-r", "rsq", "--seed", "x"], ["--seed"]),
        (["-m", "m", "-r", "rsq", "--seed", "99999999999"], ["--seed", "4294967295"]),
        (["-m", "m", "-r", "rsq", "--eval", ","], ["--eval", "no name"]),
        (["-m", "m", "-r", "rsq", "--task-path", "nowhere"], ["--task-path", "nowhere"]),
        (["-m", "m", "-r", "rsq", "more"], ["more"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_options_are_refused_before_the_pipeline(pipeline, command, arguments, parts):
    stderr = refused(command, *arguments)
    assert all(part in stderr for part in parts), stderr
    assert pipeline == []


def test_out_must_not_be_a_file(pipeline, tmp_path):
    (tmp_path / "f").touch()
    assert "is a file" in refused("run", "-m", "m", "-r", "rsq", "--out", str(tmp_path / "f"))


@pytest.mark.parametrize("command", [["run", "-m", "m", "-r", "rsq"], ["plan", "-m", "m", "-r", "rsq"]])
def test_offline_is_set_before_the_pipeline_is_called(monkeypatch, stand_in, command):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    seen = []

    def look(*args, **kwargs):
        seen.append(os.environ["HF_HUB_OFFLINE"])
        raise InputError("--model", "m", "stop here")

    stand_in("compress.pipeline", run=look, plan=look)
    invoke(*command)
    invoke(*command, "--offline")
    assert seen == ["0", "1"]


# eval, inspect, generate


def test_eval_hands_over_every_option(stand_in, tmp_path):
    outcome = SimpleNamespace(lines=lambda: ["| task |"], to_json=lambda: {"piqa": 0.6})
    calls = stand_in("compress.evaluate", evaluate=lambda *args, **kwargs: outcome)
    places = stand_in("compress.eval_output", Output=lambda *args: args)
    assert invoke("eval", "m").stdout == "| task |\n"
    arguments = ["--tasks", "perplexity,piqa", "--baseline", "b", "--limit", "9", "--window", "512", "--windows", "all"]
    arguments += ["--text", "pydoc", "--batch-size", "2", "--device", "cpu", "--task-path", str(tmp_path), "--json"]
    arguments += ["--stride", "256", "--lengths", "512,1024", "--depths", "3", "--samples", "2", "--seed", "5"]
    arguments += ["--haystack", "repeat", "--num-fewshot", "1", "--chat-template", "--output", "o", "--log-samples"]
    assert json.loads(invoke("eval", "m", *arguments).stdout) == {"piqa": 0.6}
    assert calls[0].args == ("m", ["perplexity"], EvalOptions())
    assert [one.args for one in places] == [(Path("o"), True)]
    assert [one.output for one in calls] == [None, (Path("o"), True)]
    assert calls[1].args[1:] == (
        ["perplexity", "piqa"],
        EvalOptions(
            baseline="b",
            task_path=tmp_path,
            limit=9,
            window=512,
            windows=None,
            text="pydoc",
            batch_size=2,
            device="cpu",
            stride=256,
            lengths=(512, 1024),
            depths=3,
            samples=2,
            seed=5,
            haystack="repeat",
            num_fewshot=1,
            apply_chat_template=True,
        ),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["m", "--tasks", "none"],
        ["m", "--limit", "0"],
        ["m", "--log-samples"],
        ["m", "--window", "1"],
        ["m", "--windows", "few"],
        ["m", "--stride", "0"],
        ["m", "--lengths", "512,x"],
        ["m", "--depths", "0"],
    ],
)
def test_bad_eval_options(stand_in, arguments):
    calls = stand_in("compress.evaluate", evaluate=lambda *args: None)
    refused("eval", *arguments)
    assert calls == []


def test_inspect(stand_in, tmp_path):
    inspection = SimpleNamespace(lines=lambda: ["W3 g64"], to_json=lambda: {"bits": 3})
    calls = stand_in("compress.artifact.inspect", inspect=lambda folder: inspection)
    assert invoke("inspect", str(tmp_path)).stdout == "W3 g64\n"
    assert json.loads(invoke("inspect", str(tmp_path), "--json").stdout) == {"bits": 3}
    assert calls[0].args == (tmp_path,)
    assert "does not exist" in refused("inspect", str(tmp_path / "x"))


def test_generate_streams(stand_in):
    calls = stand_in("compress.runtime", generate=lambda *args: iter(["The ", "sea", "."]))
    assert invoke("generate", "m", "--prompt", "p").stdout == "The sea.\n"
    options = ["--max-new-tokens", "5", "--temperature", "0.7", "--seed", "3", "--no-chat", "--trust-remote-code"]
    invoke("generate", "m", "--prompt", "p", *options)
    assert calls[0].args == ("m", "p", GenerateOptions())
    assert calls[1].args[2] == GenerateOptions(
        max_new_tokens=5, temperature=0.7, seed=3, chat=False, trust_remote_code=True
    )
    refused("generate", "m")
    refused("generate", "m", "-p", "x", "--temperature", "-1")
    invoke("generate", "m", "--prompt", "p", "--activations", "int8")
    assert calls[2].args[2] == GenerateOptions(activations="int8")


def test_serve(stand_in, tmp_path):
    def ready(model, options, *, on_ready, on_warning):
        on_warning("take care")
        on_ready("http://127.0.0.1:80/v1")

    calls = stand_in("compress.serving.server", serve=ready)
    result = invoke("serve", "m")
    assert result.stdout == "serving m at http://127.0.0.1:80/v1 (Ctrl-C stops)\n"
    assert result.stderr == "warning: take care\n"
    options = ["--host", "::1", "--port", "0", "--served-name", "x", "--max-concurrent", "3", "--max-queue", "0"]
    options += ["--max-request-bytes", "99", "--grace-seconds", "0", "--activations", "int8", "--device", "cpu"]
    invoke("serve", "m", *options, "--api-key-file", str(tmp_path / "key"), "--trust-remote-code")
    assert calls[0].args == ("m", ServeOptions())
    assert calls[1].args[1] == ServeOptions(
        host="::1",
        port=0,
        api_key_file=tmp_path / "key",
        served_name="x",
        max_request_bytes=99,
        max_concurrent=3,
        max_queue=0,
        grace_seconds=0,
        activations="int8",
        device="cpu",
        trust_remote_code=True,
    )
    for wrong in (["--port", "-1"], ["--max-concurrent", "0"], ["--max-request-bytes", "0"], ["--grace-seconds", "-1"]):
        refused("serve", "m", *wrong)


# recipes


def test_recipes_lists_every_recipe():
    lines = invoke("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(Recipe.shipped())
    assert json.loads(invoke("recipes", "--json").stdout) == Recipe.shipped()


def test_recipes_show_prints_the_file_or_the_resolved_recipe():
    assert invoke("recipes", "show", "rsq-paper").stdout == recipe_source("rsq-paper")
    assert invoke("recipes", "show", "rsq-paper", "--resolved").stdout == Recipe.load("rsq-paper").to_yaml()
    data = json.loads(invoke("recipes", "show", "rsq", "--json").stdout)
    assert data["weights"]["bits"] == 3
    assert "did you mean 'rsq'?" in refused("recipes", "show", "rqs")


def test_recipes_keys_explains_every_key():
    text = invoke("recipes", "keys").stdout
    assert "weights.group_size\n" in text
    assert "Allowed: 2, 3, 4, 8. Default: 4." in text


# Options in Python


def test_options_that_change_the_recipe_come_after_set():
    options = RunOptions(
        set=("weights.bits=4",), calibration='a "b": é', eval_tasks=("x",), task_path=Path("t"), seed=1
    )
    recipe = Recipe.load("rtn", options.overrides())
    assert recipe.calibration.source == 'a "b": é'
    assert recipe.calibration.seed == 1
    assert (recipe.eval.tasks, recipe.eval.task_path, recipe.weights.bits) == (("x",), "t", 4)
    assert RunOptions().overrides() == ()
    assert Recipe.load("rtn", RunOptions(eval_tasks=(), task_path=Path("t")).overrides()).eval is None
