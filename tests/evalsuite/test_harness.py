import copy
import json
import logging
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.harness import evaluate_items, evaluate_tasks, load_tasks
from compress.evalsuite.items import TaskItems, task_items
from compress.evalsuite.settings import EvalSettings
from eval_builders import TASK, make_model
from models import CHAT_TEMPLATE
from transformers import DynamicCache


@pytest.fixture
def settings(task_folder, dataset_cache, monkeypatch, tmp_path_factory):
    """The task folder, with the current directory elsewhere."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    return EvalSettings(task_path=str(task_folder), batch_size=4)


def accuracy(model, tokenizer, folder):
    """Accuracy on the local task, one question at a time."""
    right = []
    for line in (folder.parent / "data" / "questions.jsonl").read_text().splitlines():
        item = json.loads(line)
        prompt = tokenizer(f"Question: {item['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in item["choices"]:
            answer = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logits.gather(1, torch.tensor(answer)[:, None]).sum()))
        right.append(scores.index(max(scores)) == item["label"])
    return sum(right) / len(right)


def test_local_task_from_anywhere(model, tokenizer, settings, task_folder):
    found = evaluate_tasks(model, tokenizer, ["sums"], settings)
    entry = found["results"]["sums"]
    assert entry["acc,none"] == pytest.approx(accuracy(model, tokenizer, task_folder))
    assert 0 < entry["acc_stderr,none"] < 1
    assert found["n-samples"]["sums"] == {"original": 6, "effective": 6}
    assert found["versions"]["sums"] == 1.0
    assert found["higher_is_better"]["sums"] == {"acc": True}
    data = task_folder.parent / "data" / "questions.jsonl"
    assert found["configs"]["sums"]["dataset_kwargs"]["data_files"] == {"validation": str(data)}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_limit_and_few_shot(model, tokenizer, settings, task_folder):
    (task_folder / "sums.yaml").write_text(TASK.format(name="sums") + "fewshot_split: validation\n")
    found = evaluate_tasks(model, tokenizer, ["sums"], replace(settings, limit=3, num_fewshot=2))
    assert found["n-samples"]["sums"]["effective"] == 3
    assert found["n-shot"]["sums"] == 2


def test_group_tag_and_python_function(model, tokenizer, settings, task_folder):
    (task_folder / "hard.py").write_text("def ask(doc):\n    return 'Q: ' + doc['question']\n")
    hard = TASK.format(name="hard").replace('"Question: {{question}}\\nAnswer:"', "!function hard.ask")
    assert "!function" in hard
    (task_folder / "hard.yaml").write_text(hard + "tag: difficult\n")
    (task_folder / "all.yaml").write_text(
        "group: all\ntask: [sums, hard]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    found = evaluate_tasks(model, tokenizer, ["all"], settings)
    assert found["group_subtasks"] == {"all": ["sums", "hard"]}
    mean = (found["results"]["sums"]["acc,none"] + found["results"]["hard"]["acc,none"]) / 2
    assert found["groups"]["all"]["acc,none"] == pytest.approx(mean)
    assert set(load_tasks(["difficult"], settings)["tasks"]) == {"hard"}


def test_generation_and_rolling_likelihood(model, tokenizer, settings, task_folder):
    (task_folder / "speak.yaml").write_text(
        TASK.format(name="speak")
        .replace("multiple_choice", "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}")
        .replace('doc_to_choice: "{{choices}}"\n', "")
        .replace("metric: acc", "metric: exact_match")
    )
    (task_folder / "read.yaml").write_text(
        TASK.format(name="read")
        .replace("multiple_choice", "loglikelihood_rolling")
        .replace('doc_to_choice: "{{choices}}"\n', "")
        .replace("doc_to_target: label", 'doc_to_target: "{{question}}"')
        .replace(
            "acc\n    aggregation: mean\n    higher_is_better: true", "bits_per_byte\n    aggregation: bits_per_byte"
        )
    )
    found = evaluate_tasks(model, tokenizer, ["speak", "read"], settings)
    assert found["results"]["speak"]["exact_match,none"] == 0
    assert found["results"]["read"]["bits_per_byte,none"] > 0


def stock_samples(model, tokenizer, tasks, settings, **options):
    """What lm-eval's own evaluation with its own model class logs."""
    from compress.evalsuite.quiet import quiet, seeded
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    loaded = load_tasks(tasks, settings)
    with quiet(), seeded():
        theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=2)
        return evaluator.evaluate(theirs, loaded, **options)["samples"]


def test_every_document_by_itself(model, tokenizer, settings, task_folder):
    (task_folder / "sums.yaml").write_text(
        TASK.format(name="sums") + "filter_list:\n  - {name: one, filter: [{function: take_first}]}\n"
        "  - {name: two, filter: [{function: take_first}]}\n"
    )
    found = evaluate_items(model, tokenizer, ["sums"], settings)
    results, items = found.results, found.items
    expected = stock_samples(model, tokenizer, ["sums"], settings)["sums"]
    assert "samples" not in results
    assert items["sums"].documents == tuple(sample["doc_hash"] for sample in expected[:6])
    assert len(set(items["sums"].documents)) == 6
    assert set(items["sums"].values) == {"acc,one", "acc,two"}
    assert items["sums"].values["acc,two"] == tuple(sample["acc"] for sample in expected[6:])
    mean = sum(items["sums"].values["acc,one"]) / 6
    assert results["results"]["sums"]["acc,one"] == pytest.approx(mean)
    limited = evaluate_items(model, tokenizer, ["sums"], replace(settings, limit=2)).items
    assert limited["sums"].documents == items["sums"].documents[:2]


def test_metrics_that_are_not_a_number_a_document_are_left_out():
    samples = [
        {"doc_id": n, "doc_hash": str(n), "filter": "none", "metrics": ["acc", "f1"], "acc": n > 0, "f1": (n, 1)}
        for n in range(2)
    ]
    assert task_items(samples) == TaskItems(("0", "1"), {"acc,none": (0.0, 1.0)})


def test_chat_template(model, tokenizer, settings, task_folder, monkeypatch):
    with pytest.raises(InputError, match=r"eval\.apply_chat_template=True: the model has no chat template"):
        evaluate_tasks(model, tokenizer, ["sums"], replace(settings, apply_chat_template=True))
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT_TEMPLATE
    (task_folder / "sums.yaml").write_text(TASK.format(name="sums") + "fewshot_split: validation\n")
    from compress.evalsuite.bridge import LoadedModel

    asked = []
    real = LoadedModel.loglikelihood

    def loglikelihood(self, requests, **kwargs):
        asked.append([request.args for request in requests])
        return real(self, requests, **kwargs)

    monkeypatch.setattr(LoadedModel, "loglikelihood", loglikelihood)
    for multiturn in (True, False):
        chat = {
            "apply_chat_template": True,
            "system_instruction": "Be brief.",
            "fewshot_as_multiturn": multiturn,
        }
        chosen = replace(settings, num_fewshot=1, **chat)
        found = evaluate_tasks(model, chatty, ["sums"], chosen)
        expected = stock_samples(model, chatty, ["sums"], chosen, **chat)["sums"]
        assert asked[-1] == [arguments for sample in expected for arguments in sample["arguments"]]
        assert asked[-1][0][0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion:")
        assert found["results"]["sums"]["acc,none"] == pytest.approx(sum(sample["acc"] for sample in expected) / 6)
        assert {key: found["config"][key] for key in chat} == chat
    assert asked[0] != asked[1]


def test_a_chat_template_that_refuses_a_question(model, tokenizer, settings):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no questions, please') }}"
    with pytest.raises(InputError, match=r"eval\.apply_chat_template=true: the model's chat .*: no questions, please"):
        evaluate_tasks(model, strict, ["sums"], replace(settings, apply_chat_template=True))


def test_the_method_is_active_while_scoring_and_decoding(model, tokenizer, settings, task_folder):
    (task_folder / "speak.yaml").write_text(
        TASK.format(name="speak")
        .replace("multiple_choice", "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}")
        .replace('doc_to_choice: "{{choices}}"\n', "")
        .replace("metric: acc", "metric: exact_match")
    )
    made = []

    def cache():
        made.append(DynamicCache())
        return made[-1]

    with_cache = evaluate_items(model, tokenizer, ["sums", "speak"], settings, cache)
    assert len(made) == 12  # six questions, six prompts
    assert min(held.get_seq_length() for held in made) > 10
    assert with_cache.items == evaluate_items(model, tokenizer, ["sums", "speak"], settings).items


def test_templates_are_compiled_once(model, tokenizer, settings, monkeypatch):
    from lm_eval import utils

    compiled = []
    real = type(utils.env).compile
    monkeypatch.setattr(type(utils.env), "compile", lambda *args, **kw: compiled.append(args[1]) or real(*args, **kw))
    evaluate_tasks(model, tokenizer, ["sums"], settings)
    assert compiled.count("Question: {{question}}\nAnswer:") <= 2  # once to look at the task, once to run it
    assert "from_string" not in vars(utils.env)


def test_bootstrap_runs_in_this_process_and_prints_nothing(model, tokenizer, settings, task_folder, capfd, monkeypatch):
    import multiprocessing

    monkeypatch.setattr(multiprocessing, "Pool", lambda *args: pytest.fail("a pool was started"))
    (task_folder / "sums.yaml").write_text(TASK.format(name="sums").replace("aggregation: mean", "aggregation: median"))
    found = evaluate_tasks(model, tokenizer, ["sums"], settings)
    assert isinstance(found["results"]["sums"]["acc_stderr,none"], float)
    assert capfd.readouterr() == ("", "")
    assert "DISABLE_MULTIPROC" not in os.environ


def test_progress_bars_are_drawn_on_request(model, tokenizer, settings, capfd):
    evaluate_tasks(model, tokenizer, ["sums"], replace(settings, progress=True))
    out, err = capfd.readouterr()
    assert out == ""
    assert "loglikelihood" in err


def test_the_callers_things_are_left_alone(tokenizer, settings):
    model = make_model(258).train()
    model.config.tie_word_embeddings = True  # a head untied by us while the config still says "tied"
    head = model.lm_head.weight.clone()
    before = (random.getstate(), torch.get_rng_state(), tokenizer.pad_token, logging.getLogger("lm_eval").level)
    evaluate_tasks(model, tokenizer, ["sums"], settings)
    assert torch.equal(model.lm_head.weight, head)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie_weights" not in vars(model)
    assert model.training
    after = (random.getstate(), torch.get_rng_state(), tokenizer.pad_token, logging.getLogger("lm_eval").level)
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_tasks_out_of_reach(settings, monkeypatch):
    """As when the Hub can't be reached: datasets raises ConnectionError after its retries."""
    import datasets

    monkeypatch.setattr("compress.evalsuite.harness.hub_problem", lambda: None)

    def unreachable(path, **kwargs):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"eval\.tasks=hellaswag: its dataset Rowan/hellaswag is out of reach"):
        load_tasks(["hellaswag"], settings)


def test_no_hub_and_no_copy_is_told_without_trying(settings, dataset_cache, monkeypatch):
    import datasets

    def attempt(path, **kwargs):
        raise ConnectionError("tried")

    monkeypatch.setattr(datasets, "load_dataset", attempt)
    monkeypatch.setattr("compress.evalsuite.harness.hub_problem", lambda: "the Hub is away")
    with pytest.raises(InputError, match=r"eval\.tasks=cola: the Hub is away, and .* its dataset nyu-mll/glue"):
        load_tasks(["sums", "cola"], settings)
    (dataset_cache / "nyu-mll___glue").mkdir()
    with pytest.raises(InputError, match="tried"):
        load_tasks(["cola"], settings)


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        ("{not json\n", ("", ""), "eval.tasks=sums: its data cannot be read"),
        (None, ("task: sums", "task: sums\nunsafe_code: true"), "runs code that the model writes"),
        (None, ("dataset_path: json", "dataset_path: jsonn"), "eval.tasks=sums: the Hub is away, .* dataset jsonn"),
    ],
)
def test_bad_local_tasks(settings, task_folder, content, change, message, monkeypatch):
    monkeypatch.setattr("compress.evalsuite.harness.hub_problem", lambda: "the Hub is away")
    if content is not None:
        (task_folder.parent / "data" / "questions.jsonl").write_text(content)
    path = Path(task_folder / "sums.yaml")
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        load_tasks(["sums"], settings)
