import re
import sys

import pyarrow.csv
import pyarrow.parquet
import pytest
from compress.calibrate.errors import InputError
from compress.evalsuite.builtin_tasks import find_builtin_tasks
from compress.evalsuite.catalogue import Catalogue, harness_tasks, long_context_tasks, text_tasks, validate_tasks
from eval_builders import TASK


@pytest.fixture(scope="module")
def builtin():
    return find_builtin_tasks()


def test_builtin_names_of_every_kind(builtin):
    assert builtin.files["hellaswag"].name == "hellaswag.yaml"
    assert builtin.files["squadv2"].name == "squadv2.yaml"  # a Python task
    assert builtin.files["mmlu"].name == "_mmlu.yaml"  # a group
    assert "aclue_couplet_prediction" in builtin.files  # quoted keys
    assert {"cola", "mnli"} <= builtin.tags["glue"]  # a tag over several folders


def test_builtin_index_equals_lm_evals_own(builtin):
    """On a folder with quoted keys, included templates, groups and tags; the whole index takes lm-eval 20 seconds."""
    from lm_eval.tasks import TaskManager

    for name in ("aclue_couplet_prediction", "mmlu", "cola", "arc_easy", "belebele_eng_Latn"):
        folder = builtin.files[name].parent
        theirs = TaskManager(include_path=str(folder), include_defaults=False).task_index
        for other, entry in theirs.items():
            if entry.yaml_path is not None:
                assert builtin.files[other] == entry.yaml_path
            else:
                assert builtin.tags[other] >= entry.tags


def test_members_of_builtin_groups_are_found():
    selection = Catalogue(None).select(["mmlu", "glue", "perplexity"])
    assert {"mmlu", "mmlu_stem", "mmlu_astronomy", "cola"} <= selection.builtin.keys()
    assert "cola" in selection.tags["glue"]
    assert "hellaswag" not in selection.builtin


def test_local_tasks_need_no_search(task_folder, monkeypatch):
    monkeypatch.setattr("compress.evalsuite.catalogue.find_builtin_tasks", lambda: pytest.fail("searched"))
    validate_tasks(["sums", "perplexity"], str(task_folder))


def test_our_own_tasks_need_no_files_and_win(monkeypatch):
    monkeypatch.setattr("compress.evalsuite.catalogue.find_builtin_tasks", lambda: pytest.fail("searched"))
    asked = ["niah_single_2", "divergence", "passkey", "perplexity"]
    assert Catalogue(None).select(asked).builtin == {}
    asked.insert(1, "piqa")
    assert text_tasks(asked) == ["divergence", "perplexity"]
    assert long_context_tasks(asked) == ["niah_single_2", "passkey"]
    assert harness_tasks(asked) == ["piqa"]


def test_validation_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from compress.evalsuite.catalogue import validate_tasks; validate_tasks(['hellaswag']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sumz", "'sums'"),
        ("perplexty", "'perplexity'"),
        ("diverence", "'divergence'"),
        ("pass_key", "'passkey'"),
        ("hellaswg", "'hellaswag'"),
        ("qqqqqqqqqqqqq", None),
    ],
)
def test_unknown_task_names_the_nearest(task_folder, name, hint):
    with pytest.raises(InputError) as caught:
        validate_tasks(["sums", name], str(task_folder))
    assert str(caught.value).startswith(f"eval.tasks={name}: no such task")
    assert (f"did you mean {hint}?" in str(caught.value)) if hint else ("did you mean" not in str(caught.value))


def test_missing_data_file(task_folder):
    data = task_folder.parent / "data" / "questions.jsonl"
    data.unlink()
    with pytest.raises(InputError, match=f"eval.tasks=sums: its data file {re.escape(str(data))} does not exist"):
        validate_tasks(["sums"], str(task_folder))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_data_without_rows(task_folder, name):
    table = pyarrow.table({"question": pyarrow.array([], pyarrow.string())})
    (pyarrow.csv.write_csv if name.endswith("csv") else pyarrow.parquet.write_table)(table, task_folder / name)
    path = task_folder / "sums.yaml"
    path.write_text(path.read_text().replace("../data/questions.jsonl", name))
    with pytest.raises(InputError, match=f"its data file .*{name} is empty"):
        validate_tasks(["sums"], str(task_folder))
    (task_folder / name).write_bytes(b"neither\nnor")  # for datasets to read, and to refuse
    validate_tasks(["sums"], str(task_folder))


def test_empty_data_file(task_folder):
    (task_folder.parent / "data" / "questions.jsonl").write_text("")
    with pytest.raises(InputError, match=r"questions\.jsonl is empty"):
        validate_tasks(["sums"], str(task_folder))


def test_other_tasks_of_the_folder_may_be_broken(task_folder):
    (task_folder / "other.yaml").write_text(TASK.format(name="other").replace("questions", "absent"))
    validate_tasks(["sums"], str(task_folder))
    with pytest.raises(InputError, match=r"eval\.tasks=other"):
        validate_tasks(["other"], str(task_folder))


def test_patterns_and_addresses_in_data_files(task_folder):
    task = TASK.format(name="sums")
    (task_folder / "sums.yaml").write_text(task.replace("../data/questions.jsonl", "../*/quest*.jsonl"))
    validate_tasks(["sums"], str(task_folder))
    (task_folder / "sums.yaml").write_text(task.replace("../data/questions", "https://example.org/questions"))
    validate_tasks(["sums"], str(task_folder))
    (task_folder / "sums.yaml").write_text(task.replace("../data/questions.jsonl", "../*/absent*.jsonl"))
    with pytest.raises(InputError, match="does not exist"):
        validate_tasks(["sums"], str(task_folder))


def test_data_files_belong_to_the_file_that_names_them(task_folder):
    deeper = task_folder / "deeper"
    deeper.mkdir()
    (deeper / "child.yaml").write_text("include: ../sums.yaml\ntask: child\n")
    selection = Catalogue(str(task_folder)).select(["child"])
    assert selection.local["child"].data_files == (task_folder.parent / "data" / "questions.jsonl",)
    validate_tasks(["child"], str(task_folder))


def test_group_of_the_folder(task_folder):
    (task_folder / "all.yaml").write_text("group: all\ntask:\n  - sums\n  - group: inner\n    task: [gone]\n")
    with pytest.raises(InputError, match=r"eval.tasks=gone: no such task, but the group all in .*all\.yaml"):
        validate_tasks(["all"], str(task_folder))
    (task_folder / "all.yaml").write_text("group: all\ntask:\n  - sums\n")
    assert set(Catalogue(str(task_folder)).select(["all"]).local) == {"all", "sums"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [unclosed", "not valid YAML"),
        ("include: nowhere.yaml\ntask: x", "cannot be read"),
        ("include: bad.yaml", "includes itself"),
    ],
)
def test_bad_task_files(task_folder, content, message):
    (task_folder / "bad.yaml").write_text(content)
    with pytest.raises(InputError, match=f"eval.task_path=.*{message}"):
        validate_tasks(["sums"], str(task_folder))


def test_task_path_is_no_folder(task_folder):
    with pytest.raises(InputError, match=r"eval.task_path=.*sums\.yaml: not a folder; give the folder"):
        validate_tasks(["sums"], str(task_folder / "sums.yaml"))
    with pytest.raises(InputError, match=r"eval.task_path=.*absent: not a folder$"):
        validate_tasks(["sums"], str(task_folder / "absent"))
