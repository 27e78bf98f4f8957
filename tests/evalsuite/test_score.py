import json
import math
from dataclasses import replace

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.compare import compare, markdown_table
from compress.evalsuite.perplexity import perplexity
from compress.evalsuite.score import EvalSettings, Metric, Scores, score, tokenizer_fingerprint
from eval_builders import NamedText, make_model, make_tokenizer


@pytest.fixture
def settings(task_folder, dataset_cache):
    return EvalSettings(window=64, windows=5, task_path=str(task_folder))


@pytest.fixture(scope="module")
def ppl(model, tokenizer, text):
    return score(model, tokenizer, ["perplexity"], EvalSettings(window=64, windows=5), text)


def test_perplexity_is_that_of_the_whole_text_without_special_tokens(model, ppl, text):
    ids = torch.tensor(make_tokenizer()(text.text, add_special_tokens=False)["input_ids"])
    expected = perplexity(model, ids, 64, 5)
    assert ppl.perplexity == expected
    assert ppl.metrics == (Metric("perplexity", "perplexity@64", expected.value, expected.stderr, False, 5 * 63),)
    assert (ppl.text, ppl.harness) == ("numbers.txt", None)


def test_tasks_keep_their_order_and_survive_json(model, tokenizer, settings, text):
    scores = score(model, tokenizer, ["sums", "perplexity", "sums"], settings, text)
    assert [(metric.task, metric.metric) for metric in scores.metrics] == [
        ("sums", "acc"),
        ("perplexity", "perplexity@64"),
    ]
    acc = scores.metrics[0]
    assert (acc.n, acc.higher_is_better) == (6, True)
    assert acc.stderr == pytest.approx(math.sqrt(acc.value * (1 - acc.value) / 5))
    assert Scores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False))) == scores


def test_infinite_perplexity_is_null_in_json(ppl):
    broken = replace(ppl, metrics=(replace(ppl.metrics[0], value=math.inf),))
    data = json.loads(json.dumps(broken.to_json(), allow_nan=False))
    assert data["metrics"][0]["value"] is None
    assert math.isnan(Scores.from_json(data).metrics[0].value)


def test_perplexity_needs_a_text(model, tokenizer, settings):
    with pytest.raises(InputError, match=r"eval\.text: the task perplexity needs a text"):
        score(model, tokenizer, ["perplexity"], settings)


def test_unknown_task_is_found_before_the_model_runs(tokenizer, settings, text):
    with pytest.raises(InputError, match=r"eval\.tasks=sumz"):
        score(None, tokenizer, ["perplexity", "sumz"], settings, text)


def test_fingerprint_tells_tokenizers_apart():
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(make_tokenizer(("<x>",))) != tokenizer_fingerprint(make_tokenizer())


def test_compare_side_by_side(tokenizer, ppl, text):
    other = score(make_model(258, seed=1), tokenizer, ["perplexity"], ppl.settings, text)
    (row,) = compare(ppl, other)
    before, after = ppl.metrics[0].value, other.metrics[0].value
    assert row.delta == pytest.approx(after - before)
    assert row.ratio == pytest.approx(after / before)
    assert row.better is (after < before)
    table = markdown_table([row]).splitlines()
    assert table[0] == "| task | metric | before | after | delta | ratio |"
    assert table[2].startswith(f"| perplexity | perplexity@64 ↓ | {before:.2f} ± ")
    assert f"{after - before:+.2f} | {after / before:.3f}× |" in table[2]


def test_zero_baseline_has_no_ratio(ppl):
    zero = replace(ppl, metrics=(replace(ppl.metrics[0], value=0.0),))
    (row,) = compare(zero, ppl)
    assert row.ratio is None
    assert row.cells()[-1] == "–"
    (same,) = compare(ppl, ppl)
    assert (same.delta, same.better) == (0, None)


def test_refuses_what_cannot_be_compared(model, tokenizer, ppl, text):
    def refused(other, what):
        with pytest.raises(InputError, match=f"--baseline.*{what}"):
            compare(ppl, other)

    refused(replace(ppl, tokenizer="another"), "tokenizer differs")
    refused(score(model, tokenizer, ["perplexity"], EvalSettings(window=32, windows=5), text), "window differs")
    refused(score(model, tokenizer, ["perplexity"], EvalSettings(window=64, windows=4), text), "number of .* windows")
    reversed_text = NamedText(text.name, text.text[::-1])
    refused(score(model, tokenizer, ["perplexity"], ppl.settings, reversed_text), "perplexity text differs")
    refused(replace(ppl, metrics=(replace(ppl.metrics[0], task="other"),)), "no metric in common")


def test_refuses_other_questions(model, tokenizer, settings):
    every = score(model, tokenizer, ["sums"], settings)
    with pytest.raises(InputError, match="limit differs"):
        compare(every, score(model, tokenizer, ["sums"], replace(settings, limit=2)))
    harness = json.loads(json.dumps(every.harness))
    harness["versions"]["sums"] = 2.0
    with pytest.raises(InputError, match="sums: version differs"):
        compare(every, replace(every, harness=harness))
