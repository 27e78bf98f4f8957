import json

from compress.artifact.layout import WIDTH, report_text


def test_records_and_figures_take_a_line_each() -> None:
    modules = [{"name": f"model.layers.{n}.self_attn.q_proj", "bits": 4, "note": "x" * 100} for n in range(3)]
    report = {
        "model": {"name": "a", "parents": ["b"]},
        "recipe": {f"key_{n}": n for n in range(30)},
        "weights": {"modules": modules},
        "eval": {"items": [0.5, None, 1] * 200, "table": ["a line of prose " * 6] * 2},
        "rows": [{"task": "t" * 100, "paired": {"n": 3, "p_value": 0.5}}],
        "empty": [],
    }
    text = report_text(report)
    assert json.loads(text) == report
    lines = text.splitlines()
    assert ' "model": {"name": "a", "parents": ["b"]},' in lines
    assert '  "key_7": 7,' in lines
    assert [line.strip(" ,") for line in lines if "layers" in line] == [json.dumps(module) for module in modules]
    assert f'  "items": {json.dumps(report["eval"]["items"])},' in lines  # type: ignore[index]
    assert sum("a line of prose" in line for line in lines) == 2
    assert '   "paired": {"n": 3, "p_value": 0.5}' in lines
    assert text.endswith(' "empty": []\n}\n')
    assert [line for line in lines if len(line) > WIDTH and '"items"' not in line and "layers" not in line] == []


def test_a_report_that_changes_in_one_module_differs_in_one_line() -> None:
    report = {"modules": [{"name": f"layer {n}", "error": n / 7, "note": "y" * 80} for n in range(20)]}
    changed = json.loads(json.dumps(report))
    changed["modules"][3]["error"] = 1.0
    pairs = zip(report_text(report).splitlines(), report_text(changed).splitlines(), strict=True)
    assert sum(one != other for one, other in pairs) == 1


def test_what_json_lacks_is_told_as_text() -> None:
    assert json.loads(report_text({"path": report_text, "pair": (1, 2)}))["pair"] == [1, 2]
