import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.compare import compare, markdown_table
from compress.evalsuite.divergence import Reference
from compress.evalsuite.items import TaskItems
from compress.evalsuite.longcontext import Answer, Cell, LongContextSettings
from compress.evalsuite.perplexity import perplexity
from compress.evalsuite.score import Material, _of_task, score, tokenise, tokenizer_fingerprint
from compress.evalsuite.scores import Metric, Scores
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.statistics import MCNEMAR, PAIRED_T, PAIRED_T_LOG
from eval_builders import TASK, NamedText, make_model, make_tokenizer
from transformers import DynamicCache


@pytest.fixture
def settings(task_folder, dataset_cache):
    return EvalSettings(window=64, windows=5, task_path=str(task_folder))


@pytest.fixture(scope="module")
def material(tokenizer, text):
    return Material(tokenise(text, tokenizer))


@pytest.fixture(scope="module")
def ppl(model, tokenizer, material):
    return score(model, tokenizer, ["perplexity"], EvalSettings(window=64, windows=5), material)


def test_perplexity_is_that_of_the_whole_text_without_special_tokens(model, ppl, text):
    ids = torch.tensor(make_tokenizer()(text.text, add_special_tokens=False)["input_ids"])
    expected = perplexity(model, ids, 64, 5)
    assert ppl.perplexity == expected
    (metric,) = ppl.metrics
    assert metric == Metric(
        "perplexity", "perplexity@64", expected.value, expected.stderr, False, 5 * 63, expected.nll, log=True
    )
    assert (ppl.text, ppl.harness) == ("numbers.txt", None)


def stored(scores: Scores) -> dict[str, Any]:
    """What a report holds of scores."""
    return json.loads(json.dumps(scores.to_json(), allow_nan=False))


def test_tasks_keep_their_order_and_are_stored(model, tokenizer, settings, material):
    scores = score(model, tokenizer, ["sums", "perplexity", "sums"], settings, material)
    assert [(metric.task, metric.metric) for metric in scores.metrics] == [
        ("sums", "acc"),
        ("perplexity", "perplexity@64"),
    ]
    acc = scores.metrics[0]
    assert (acc.n, acc.higher_is_better) == (6, True)
    assert acc.stderr == pytest.approx(math.sqrt(acc.value * (1 - acc.value) / 5))
    assert sum(acc.items) / 6 == pytest.approx(acc.value)
    kept = stored(scores)["metrics"]
    assert [(metric["value"], metric["items"]) for metric in kept] == [(m.value, list(m.items)) for m in scores.metrics]


def test_infinite_perplexity_is_null_in_json(ppl):
    broken = replace(ppl, metrics=(replace(ppl.metrics[0], value=math.inf),))
    assert stored(broken)["metrics"][0]["value"] is None


def test_perplexity_needs_a_text(model, tokenizer, settings):
    with pytest.raises(InputError, match=r"eval\.text: the task perplexity needs a text"):
        score(model, tokenizer, ["perplexity"], settings)


def test_unknown_task_is_found_before_the_model_runs(tokenizer, settings, material):
    with pytest.raises(InputError, match=r"eval\.tasks=sumz"):
        score(None, tokenizer, ["perplexity", "sumz"], settings, material)


def test_divergence_needs_a_reference(tokenizer, settings, material):
    with pytest.raises(InputError, match=r"eval\.tasks=divergence: there is no dense model"):
        score(None, tokenizer, ["divergence"], settings, material)


def test_fingerprint_tells_tokenizers_apart():
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(make_tokenizer(("<x>",))) != tokenizer_fingerprint(make_tokenizer())


def test_compare_side_by_side(tokenizer, ppl, material):
    other = score(make_model(258, seed=1), tokenizer, ["perplexity"], ppl.settings, material)
    (row,) = compare(ppl, other)
    before, after = ppl.metrics[0].value, other.metrics[0].value
    assert row.delta == pytest.approx(after - before)
    assert row.ratio == pytest.approx(after / before)
    assert row.better is (after < before)
    table = markdown_table([row]).splitlines()
    assert table[0] == "| task | metric | before | after | delta | ratio | p |"
    assert table[1] == "|---|---|---:|---:|---:|---:|---:|"
    assert table[2].startswith(f"| perplexity | perplexity@64 ↓ | {before:.2f} ± ")
    assert f"{after - before:+.2f} | {after / before:.3f}× |" in table[2]
    # Paired on the loss of each window, whose mean difference is the logarithm of the ratio.
    assert row.paired.test == PAIRED_T_LOG
    assert row.paired.n == 5
    assert math.exp(row.paired.difference) == pytest.approx(row.ratio)
    better = sum(new < old for old, new in zip(ppl.perplexity.nll, other.perplexity.nll, strict=True))
    assert (row.paired.improved, row.paired.worsened) == (better, 5 - better)
    assert table[2].endswith(f"{after / before:.3f}× | {row.paired.p_value:.2f} |")


@pytest.mark.parametrize(
    ("p_value", "cell"), [(0.467, "0.47"), (0.0312, "0.031 *"), (0.0049, "0.005 **"), (2e-5, "<0.001 ***"), (None, "–")]
)
def test_p_values_in_the_table(ppl, p_value, cell):
    (row,) = compare(ppl, ppl)
    assert replace(row, paired=replace(row.paired, p_value=p_value)).cells()[-1] == cell


def test_zero_baseline_has_no_ratio(ppl):
    zero = replace(ppl, metrics=(replace(ppl.metrics[0], value=0.0),))
    (row,) = compare(zero, ppl)
    assert row.ratio is None
    assert row.cells()[-2] == "–"
    (same,) = compare(ppl, ppl)
    assert (same.delta, same.better) == (0, None)


def test_refuses_what_cannot_be_compared(model, tokenizer, ppl, text, material):
    def refused(other, what):
        with pytest.raises(InputError, match=f"--baseline.*{what}"):
            compare(ppl, other)

    refused(replace(ppl, tokenizer="another"), "tokenizer differs")
    refused(score(model, tokenizer, ["perplexity"], EvalSettings(window=32, windows=5), material), "window differs")
    refused(
        score(model, tokenizer, ["perplexity"], EvalSettings(window=64, windows=4), material), "number of .* windows"
    )
    reversed_text = Material(tokenise(NamedText(text.name, text.text[::-1]), tokenizer))
    refused(score(model, tokenizer, ["perplexity"], ppl.settings, reversed_text), "perplexity text differs")
    through_cache = replace(ppl.settings, kv_prompt=32)
    refused(replace(ppl, settings=through_cache), r"way through the KV cache differs \(None before, Feed\(prompt=32")
    refused(replace(ppl, metrics=(replace(ppl.metrics[0], task="other"),)), "no metric in common")


def test_refuses_other_questions(model, tokenizer, settings):
    every = score(model, tokenizer, ["sums"], settings)
    with pytest.raises(InputError, match="limit differs"):
        compare(every, score(model, tokenizer, ["sums"], replace(settings, limit=2)))
    for key, value in (("apply_chat_template", True), ("fewshot_as_multiturn", False)):
        with pytest.raises(InputError, match=f"{key} differs"):
            compare(every, replace(every, settings=replace(settings, **{key: value})))
    harness = json.loads(json.dumps(every.harness))
    harness["versions"]["sums"] = 2.0
    with pytest.raises(InputError, match="sums: version differs"):
        compare(every, replace(every, harness=harness))
    other_text = {"sums": "of other questions"}
    with pytest.raises(InputError, match="--against: cannot be compared: sums: text of the questions differs"):
        compare(every, replace(every, documents=other_text), "--against")


# Divergence, long context, items


@pytest.fixture(scope="module")
def diverged(model, tokenizer, material, tmp_path_factory):
    """The scores of a model, and those of another that is compared with it, in one pass each."""
    used = replace(material, reference=Reference(tmp_path_factory.mktemp("reference")))
    asked = (["divergence", "perplexity"], EvalSettings(window=64, windows=5, stride=32))
    before = score(model, tokenizer, *asked, used)
    return before, score(make_model(258, seed=1), tokenizer, *asked, used)


def test_divergence_beside_perplexity(diverged, model, tokenizer, material):
    before, after = diverged
    assert before.divergence is None
    assert [metric.task for metric in before.metrics] == ["perplexity"]
    assert [metric.metric for metric in after.metrics] == [
        "kl@64/32",
        "top1_agreement@64/32",
        "changed_answers@32",
        "perplexity@64/32",
    ]
    assert after.metrics[0].value == after.divergence.mean_kl > 0.1
    assert after.perplexity.nll == pytest.approx(
        perplexity(make_model(258, seed=1), material.text.ids, 64, 5, stride=32).nll, rel=1e-6
    )
    (row,) = compare(before, after)
    assert row.metric == "perplexity@64/32"
    assert math.exp(row.paired.difference) == pytest.approx(row.ratio)  # weighted by the tokens of each window
    assert stored(before)["divergence"] is None
    assert stored(after)["divergence"]["kl"] == list(after.divergence.kl)
    assert stored(after)["divergence"]["greedy"]["tokens"] == 32


@pytest.mark.parametrize(("tasks", "count"), [(["perplexity"], 5), (["divergence"], 5 + 1), (["sums"], 6)])
def test_everything_goes_through_the_cache(model, tokenizer, settings, material, tmp_path, tasks, count):
    used = replace(material, reference=Reference(tmp_path))
    settings = settings.through_cache()
    score(model, tokenizer, tasks, settings, used)
    made = []

    def cache():
        made.append(DynamicCache())
        return made[-1]

    score(model, tokenizer, tasks, settings, used, cache)
    assert len(made) == count  # a window, all prompts together, a question
    assert all(one.get_seq_length() > 0 for one in made)


def test_two_compressed_models_are_compared_by_their_divergence(diverged, model, tokenizer, material, tmp_path):
    _, one = diverged
    used = replace(material, reference=Reference(tmp_path))
    score(model, tokenizer, ["divergence"], one.settings, used)
    two = score(make_model(258, seed=2), tokenizer, ["divergence"], one.settings, used)
    rows = {row.metric: row for row in compare(one, two)}
    assert set(rows) == {"kl@64/32", "top1_agreement@64/32", "changed_answers@32"}
    kl = rows["kl@64/32"]
    assert kl.paired.test == PAIRED_T
    assert kl.paired.difference == pytest.approx(kl.delta)
    assert rows["top1_agreement@64/32"].paired is None


def test_divergence_alone_has_no_rows(diverged):
    before, after = diverged
    assert compare(replace(before, metrics=()), replace(after, metrics=after.metrics[:3])) == []


def test_right_and_wrong_answers_are_paired(model, tokenizer, settings):
    before = score(model, tokenizer, ["sums"], settings)
    after = score(make_model(258, seed=3), tokenizer, ["sums"], settings)
    row = next(row for row in compare(before, after) if row.metric == "acc")
    changed = [new - old for old, new in zip(row.before.items, row.after.items, strict=True)]
    assert row.paired.test == MCNEMAR
    assert (row.paired.improved, row.paired.worsened) == (changed.count(1), changed.count(-1))
    assert row.paired.difference == pytest.approx(row.delta)
    assert all(type(item) is int for item in stored(before)["metrics"][0]["items"])
    assert json.dumps(row.to_json(), allow_nan=False)


def results(value, **others):
    entry = {"results": {"t": {"alias": "t", "m,none": value}}, "higher_is_better": {}, "n-samples": {}}
    return entry | others


@pytest.mark.parametrize(
    ("figure", "items", "expected"),
    [
        (0.5, (1.0, 0.0), ((1.0, 0.0), False)),
        (math.exp(2.5), (-2.0, -3.0), ((2.0, 3.0), True)),  # lm-eval's aggregation "perplexity" of log-likelihoods
        (0.7, (1.0, 0.0), (None, False)),  # a figure of the whole corpus
        (0.0, (1.0, 0.0), (None, False)),
        (0.0, (0.0, 0.0), ((0.0, 0.0), False)),
    ],
)
def test_items_are_kept_where_the_figure_is_their_mean(figure, items, expected):
    (metric,) = _of_task("t", results(figure), {"t": TaskItems(("a", "b"), {"m,none": items})})
    assert (metric.items, metric.log) == expected


def test_a_group_has_the_items_of_its_tasks():
    group = results(0.75, group_subtasks={"t": ["a", "b"], "b": ["c"]})
    items = {"a": TaskItems(("x",), {"m,none": (1.0,)}), "c": TaskItems(("y",) * 3, {"m,none": (1.0, 0.0, 1.0)})}
    assert _of_task("t", group, items)[0].items == (1.0, 1.0, 0.0, 1.0)
    mean_of_means = results((1 + 2 / 3) / 2, group_subtasks={"t": ["a", "c"]})
    assert _of_task("t", mean_of_means, items)[0].items is None


def test_a_group_through_lm_eval(model, tokenizer, settings, task_folder):
    (task_folder / "more.yaml").write_text(TASK.format(name="more"))
    (task_folder / "both.yaml").write_text(
        "group: both\ntask: [sums, more]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    scores = score(model, tokenizer, ["both"], settings)
    whole, *parts = sorted((m for m in scores.metrics if m.metric == "acc"), key=lambda m: m.task != "both")
    assert [metric.task for metric in (whole, *parts)] == ["both", "sums", "more"]
    assert whole.items == parts[0].items + parts[1].items
    assert len(scores.documents["sums"]) == 64
    row = next(row for row in compare(scores, scores) if row.task == "both")
    assert (row.paired.test, row.paired.n, row.paired.p_value) == (MCNEMAR, 12, 1.0)


def test_needles_by_length(monkeypatch, model, tokenizer, settings):
    asked = []

    def found(model, tokenizer, tasks, settings, haystack, cache):
        asked.append((list(tasks), settings, haystack, cache))
        return [
            Cell(task, length, depth, sum(right) / 2, 2, tuple(Answer(("7",), "7", value) for value in right))
            for task in tasks
            for length in settings.lengths
            for depth, right in ((0.0, (1.0, 0.0)), (1.0, (1.0, float(length == 64))))
        ]

    monkeypatch.setattr("compress.evalsuite.score.long_context", found)
    chosen = replace(settings, lengths=(64, 128), depths=2, samples=2, seed=3)
    scores = score(model, tokenizer, ["passkey"], chosen, Material(haystack=NamedText("t", "hay")), cache=DynamicCache)
    assert asked == [(["passkey"], LongContextSettings((64, 128), 2, 2, 3), "hay", DynamicCache)]
    assert [(m.task, m.metric, m.value, m.n) for m in scores.metrics] == [
        ("passkey", "string_match@64", 0.75, 4),
        ("passkey", "string_match@128", 0.5, 4),
    ]
    assert scores.metrics[0].items == (1.0, 0.0, 1.0, 1.0)
    assert [(cell.length, cell.depth, cell.score, cell.answers) for cell in scores.long_context][:2] == [
        (64, 0.0, 0.5, ()),
        (64, 1.0, 1.0, ()),
    ]
    cell = stored(scores)["long_context"][0]
    assert "answers" not in cell
    assert (cell["length"], cell["depth"], cell["score"]) == (64, 0.0, 0.5)
    other = score(model, tokenizer, ["passkey"], chosen, Material(haystack=NamedText("t", "straw")))
    with pytest.raises(InputError, match="haystack differs"):
        compare(scores, other)
    with pytest.raises(InputError, match="long-context seed differs"):
        compare(scores, replace(scores, settings=replace(chosen, seed=4)))


def test_a_length_beyond_the_context(tokenizer, settings):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
    with pytest.raises(InputError, match=r"eval\.lengths.*256"):
        score(model, tokenizer, ["passkey"], replace(settings, lengths=(512,)))
