"""Task files that don't fit their data: each a line that names task, file and cause, before a model is there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compress.calibrate.errors import InputError
from compress.evalsuite import harness
from compress.evalsuite.harness import evaluate_items, load_tasks
from compress.evalsuite.score import Material, score
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.task_errors import blamed_on
from eval_builders import TASK

SUMS = TASK.format(name="sums")
SPEAK = (
    SUMS.replace("multiple_choice", "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}")
    .replace('doc_to_choice: "{{choices}}"\n', "")
    .replace("metric: acc", "metric: exact_match")
)
CHOICE, TARGET = 'doc_to_choice: "{{choices}}"', "doc_to_target: label"
HELPER = """\
def missing(doc):
    return doc["nope"]

def late(doc):
    return doc["choices"] if doc["question"] == "What is 0 + 0?" else doc["nope"]

def last(doc):
    return 1 if doc["question"] == "What is 0 + 0?" else doc["nope"]

def none(docs):
    return docs.select([])

def figures(doc, results):
    return {"acc": doc["nope"]}

def said(doc, results):
    return {"exact_match": {"four": 4}[results[0]]}

def total(items):
    return sum(items) / (len(items) - 6)
"""


@pytest.fixture
def settings(task_folder, dataset_cache):
    (task_folder / "helper.py").write_text(HELPER)
    (task_folder / "broken.py").write_text("def choices(:\n")
    return EvalSettings(task_path=str(task_folder))


def refusal(settings, content, *, asked="sums"):
    path = Path(settings.task_path, "sums.yaml")
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_tasks([asked], settings)
    text = str(caught.value)
    assert "\n" not in text
    start = f"eval.tasks=sums: the task file {path} does not fit its data: "
    assert text.startswith(start)
    return text[len(start) :]


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (CHOICE, "doc_to_choice: nothing", "doc_to_choice: ValueError: malformed node"),
        (CHOICE, "doc_to_choice: question", "doc_to_choice gives 'What is 0 + 0?' for the first document, which is no"),
        (CHOICE, "doc_to_choice: 3", "doc_to_choice: TypeError"),
        (CHOICE, 'doc_to_choice: "{{choices"', "doc_to_choice: TemplateSyntaxError: unexpected end of template"),
        (CHOICE, 'doc_to_choice: "{{[1 / 0]}}"', "doc_to_choice: ZeroDivisionError"),
        (CHOICE, "doc_to_choice: !function helper.missing", "doc_to_choice: KeyError: 'nope'"),
        (CHOICE, "doc_to_choice: !function helper.nothing", "AttributeError: Module"),
        (CHOICE, "doc_to_choice: !function nowhere.choices", "ImportError: Cannot import module 'nowhere'"),
        (CHOICE, "doc_to_choice: !function broken.choices", "SyntaxError: invalid syntax"),
        (TARGET, 'doc_to_target: "{{labl}}"', "doc_to_target: UndefinedError: 'labl' is undefined"),
        (TARGET, "doc_to_target: labl", "the answer to the first document, 'labl', is neither one of its 2 choices"),
        (TARGET, "doc_to_target: -1", "the answer to the first document, -1, is neither"),
        (TARGET, "doc_to_target: 7", "IndexError: list index out of range"),
        (TARGET, "", "doc_to_target: TypeError"),
        ("{{question}}", "{{goal}}", "doc_to_text: UndefinedError: 'goal' is undefined"),
        ("validation_split: validation", "validation_split: test", "its data has no split 'test'"),
        ("validation_split: validation", "", "ValueError: Task dataset"),
        ("metadata:", "process_docs: !function helper.none\nmetadata:", "no document is left of its data"),
        ("output_type: multiple_choice", "output_type: choice", "ValueError: Got invalid output_type 'choice'"),
        ("metric: acc", "metric: perplexity", "lm-eval has no metric perplexity for the output type multiple_choice"),
        ("aggregation: mean", "aggregation: meen", "lm-eval has no aggregation of the name that is given for"),
        ("aggregation: mean", "aggregation: weighted_perplexity", "TypeError: 'float' object is not iterable"),
        ("metadata:", "process_results: !function helper.figures\nmetadata:", "process_results: KeyError: 'nope'"),
        ("metadata:", "fewshot_split: validation\nnum_fewshot: 20\nmetadata:", "ValueError: Sample larger than"),
        ("metadata:", "colour: red\nmetadata:", "TypeError: TaskConfig.__init__() got an unexpected keyword"),
        (
            "metadata:",
            "filter_list: [{name: a, filter: [{function: nothing}]}]\nmetadata:",
            'KeyError: "Unknown filter',
        ),
    ],
)
def test_multiple_choice(settings, old, new, cause):
    assert old in SUMS
    assert cause in refusal(settings, SUMS.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("until: ['.']", "until: 3", "generation_kwargs.until holds 3, which is no text"),
        ("max_gen_toks: 4", "max_gen_toks: four", "ValueError: invalid literal for int()"),
        ("{until: ['.'], max_gen_toks: 4}", "3", "TypeError: argument of type 'int' is not iterable"),
        (TARGET, f"doc_to_target: question\n{CHOICE}", "process_results: TypeError: list indices must be integers"),
    ],
)
def test_generation(settings, old, new, cause):
    assert old in SPEAK
    assert cause in refusal(settings, SPEAK.replace(old, new))


def test_the_member_of_a_group_is_named(settings, task_folder):
    (task_folder / "good.yaml").write_text(TASK.format(name="good") + "tag: both\n")
    (task_folder / "all.yaml").write_text("group: all\ntask: [good, sums]\n")
    broken = SUMS.replace(TARGET, 'doc_to_target: "{{labl}}"') + "tag: both\n"
    assert "'labl' is undefined" in refusal(settings, broken, asked="all")
    assert "'labl' is undefined" in refusal(settings, broken, asked="both")


@pytest.mark.parametrize("key", ["tag", "include"])
def test_a_key_of_another_type(settings, task_folder, key):
    (task_folder / "sums.yaml").write_text(SUMS + f"{key}: 5\n")
    with pytest.raises(InputError, match=rf"eval\.task_path=.*sums\.yaml: its {key} is neither a text nor .* but 5"):
        load_tasks(["sums"], settings)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (SUMS.replace("mean", "!function helper.total"), "ZeroDivisionError"),
        (
            SPEAK.replace("metadata:", "process_results: !function helper.said\nmetadata:"),
            "process_results: KeyError: ",
        ),
    ],
)
def test_what_shows_only_later(model, tokenizer, settings, task_folder, content, cause):
    """Only a model's answers show that the file isn't in order."""
    (task_folder / "sums.yaml").write_text(content)
    assert load_tasks(["sums"], settings)["tasks"]
    with pytest.raises(InputError, match=rf"eval\.tasks=sums: the task file .*sums\.yaml does not fit .*{cause}"):
        evaluate_items(model, tokenizer, ["sums"], settings)


@pytest.mark.parametrize(
    ("old", "new"), [(CHOICE, "doc_to_choice: !function helper.late"), (TARGET, "doc_to_target: !function helper.last")]
)
def test_every_document_is_read_before_a_model_is_there(settings, old, new):
    content = SUMS.replace(old, new)
    key = new.split(":")[0]
    assert refusal(settings, content) == f"document 2: {key}: KeyError: 'nope'"
    assert load_tasks(["sums"], replace(settings, limit=1))["tasks"]


@pytest.mark.parametrize(("extra", "most"), [("", 5), ("fewshot_split: validation\n", 6)])
def test_more_examples_than_there_are_documents(settings, extra, most):
    Path(settings.task_path, "sums.yaml").write_text(SUMS + extra)
    assert load_tasks(["sums"], replace(settings, num_fewshot=most))["tasks"]
    with pytest.raises(InputError, match=rf"eval.num_fewshot=7: the task sums has 6 documents .* 0 to {most}"):
        load_tasks(["sums"], replace(settings, num_fewshot=7))


def test_errors_that_are_not_the_files_stay(model, tokenizer, settings, monkeypatch):
    def fails(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr("compress.evalsuite.bridge.score_continuations", fails)
    with pytest.raises(KeyError, match="ours"):
        evaluate_items(model, tokenizer, ["sums"], settings)
    with pytest.raises(OSError, match="full"), blamed_on("sums", None):
        raise OSError("disk full")


def test_the_whole_document_is_not_in_the_line():
    with pytest.raises(InputError) as caught, blamed_on("sums", None):
        raise ValueError("long\n" * 1000)
    assert len(str(caught.value)) < 400


def test_looking_at_the_first_document_changes_no_answer(model, tokenizer, settings, task_folder, monkeypatch):
    (task_folder / "sums.yaml").write_text(SUMS + "fewshot_split: validation\nnum_fewshot: 2\n")
    tried = evaluate_items(model, tokenizer, ["sums"], settings)
    monkeypatch.setattr(harness, "try_first_document", lambda *_: None)
    untried = evaluate_items(model, tokenizer, ["sums"], settings)
    arguments = [sample["arguments"] for sample in tried.samples["sums"]]
    assert arguments == [sample["arguments"] for sample in untried.samples["sums"]]
    assert tried.results["results"] == untried.results["results"]
    assert {question.count("Question:") for pairs in arguments for question, _ in pairs} == {3}


def test_tasks_are_loaded_once_for_several_models(model, tokenizer, settings, task_folder, monkeypatch):
    (task_folder / "sums.yaml").write_text(SUMS + "fewshot_split: validation\nnum_fewshot: 2\n")
    loaded, alone = load_tasks(["sums"], settings), score(model, tokenizer, ["sums"], settings)
    monkeypatch.setattr(harness, "load_tasks", lambda *_: pytest.fail("loaded again"))
    for _ in range(2):
        found = score(model, tokenizer, ["sums"], settings, Material(tasks=loaded))
        assert found.metrics == alone.metrics
        assert found.documents == alone.documents
    limited = score(model, tokenizer, ["sums"], replace(settings, limit=2), Material(tasks=loaded))
    assert limited.metrics[0].n == 2
    assert json.dumps(limited.to_json())
