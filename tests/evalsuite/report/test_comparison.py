"""Several artifacts side by side."""

import json
from typing import Any

import pytest
from compress.evalsuite.report import Comparison, compare_reports, render_comparison
from html_reader import Element, read
from report_builders import full_report, other_report, row
from test_render import section, table_rows


def side_by_side(*reports: dict[str, Any]) -> Comparison:
    return compare_reports([(f"art-{index}", report) for index, report in enumerate(reports)])


def page(*reports: dict[str, Any]) -> Element:
    return read(render_comparison([(f"art-{index}", report) for index, report in enumerate(reports)]))


def row_of(comparison: Comparison, section: str, key: str) -> Any:
    (found,) = [row for row in comparison.of(section) if row.key == key]
    return found


def test_the_original_is_the_first_column() -> None:
    comparison = side_by_side(full_report(), other_report())
    row = row_of(comparison, "scores", "perplexity/perplexity@1024")
    assert (row.original, [entry.value for entry in row.entries]) == (20.0, [22.0, 26.4])
    assert row.entries[0].change == "+10.0 %, p < 0.05"
    size = row_of(comparison, "size", "weight_bytes")
    assert (size.original, [entry.value for entry in size.entries]) == (200e6, [80e6, 60e6])
    assert not any(entry.differs for row in comparison.rows for entry in row.entries)
    sections = [row.section for row in comparison.rows]
    assert list(dict.fromkeys(sections)) == ["size", "scores", "agreement", "long_context", "speed", "kv", "errors"]


def test_figures_measured_differently_are_marked_and_not_drawn() -> None:
    other = other_report()
    other["eval"]["rows"][1]["n"] = 100
    other["efficiency"]["threads"] = 8
    other["calibration"]["digest"] = "decaf" * 12
    other["eval"]["long_context"]["seed"] = 5
    comparison = side_by_side(full_report(), other)
    arc = row_of(comparison, "scores", "arc_easy/acc")
    assert arc.entries[1].differs == ("items: 100, not 500",)
    assert arc.comparable(0)
    assert not arc.comparable(1)
    assert row_of(comparison, "scores", "piqa/acc").comparable(1)
    assert row_of(comparison, "speed", "decode_tokens_per_second").entries[1].differs == ("threads: 8, not 2",)
    assert row_of(comparison, "speed", "weight_bytes_on_disk").comparable(1)
    assert row_of(comparison, "long_context", "passkey/2048").entries[1].differs == ("seed: 5, not 0",)
    assert not row_of(comparison, "errors", "median").comparable(1)

    root = page(full_report(), other)
    assert "can't be compared" in root.all("header")[0].text()
    drawn = [element.text() for element in section(root, "scores").all("svg")[0].all("title")]
    assert sum("ARC-Easy, accuracy ↑" in title for title in drawn) == 1
    assert sum("PIQA" in title for title in drawn) == 2
    cells = next(cells for cells in table_rows(section(root, "scores")) if cells[0].startswith("ARC-Easy, accuracy ↑"))
    assert cells[3].endswith("not comparable: items: 100, not 500")
    assert all("art-1" not in title.text() for title in section(root, "errors").all("title"))


@pytest.mark.parametrize(
    ("key", "place", "value", "differs"),
    [
        ("arc_easy/acc", ("after", "settings", "apply_chat_template"), True, "chat template: yes, not no"),
        ("arc_easy/acc", ("settings", "num_fewshot"), 5, "examples in the prompt: 5, not 0"),
        ("arc_easy/acc", ("after", "documents", "arc_easy"), "f" * 64, "questions: ffffffffffff, not abababababab"),
        ("piqa/acc", ("after", "settings", "max_length"), 64, "longest prompt: 64, not unknown"),
        ("perplexity/perplexity@1024", ("after", "text_tokens"), "f" * 64, "tokens of the text: ffffffffffff, not "),
        ("passkey/string_match@2048", ("long_context", "seed"), 5, "seed: 5, not 0"),
        ("passkey/string_match@2048", ("long_context", "depths"), 9, "depths: 9, not 3"),
        ("passkey/string_match@2048", ("after", "haystack"), "f" * 64, "text of the haystack: ffffffffffff, not "),
    ],
)
def test_scores_of_other_questions_are_not_compared(key: str, place: tuple[str, ...], value: Any, differs: str) -> None:
    reports = [full_report(), other_report()]
    for report in reports:
        report["eval"]["rows"].append(row("passkey", "string_match@2048", 1.0, 0.8, True))
        report["eval"]["after"] = {
            "settings": {"apply_chat_template": False, "max_length": None, "window": 1024, "stride": None},
            "text_tokens": "cd" * 32,
            "haystack": "ef" * 32,
            "documents": {"arc_easy": "ab" * 32},
        }
    assert row_of(side_by_side(*reports), "scores", key).comparable(1)
    settings = reports[1]["eval"]
    for name in place[:-1]:
        settings = settings[name]
    settings[place[-1]] = value
    comparison = side_by_side(*reports)
    (found,) = row_of(comparison, "scores", key).entries[1].differs
    assert found.startswith(differs)
    assert sum(not row.comparable(1) for row in comparison.of("scores")) < len(comparison.of("scores"))


def test_agreement_on_another_text_is_not_compared() -> None:
    reports = [full_report(), other_report()]
    for report, digest in zip(reports, ("ab" * 32, "cd" * 32), strict=True):
        report["eval"]["after"] = {"text_tokens": digest}
    differs = row_of(side_by_side(*reports), "agreement", "top1_agreement").entries[1].differs
    assert differs == ("tokens of the text: cdcdcdcdcdcd, not abababababab",)


def test_other_bits_are_told_where_the_recipe_is_the_same() -> None:
    other = full_report()
    other["recipe"]["weights"] |= {"bits": 4, "overrides": {"down_proj$": 8}}
    found = section(page(full_report(), other), "origin")
    told = "4 bits, group size 64, symmetric, except down_proj$: 8"
    assert table_rows(found) == [["Weights", "3 bits, group size 64, symmetric", told]]


def test_long_texts_have_a_panel_for_the_original_and_each_artifact() -> None:
    titles = [title.text() for title in section(page(full_report(), other_report()), "needles").all("title")]
    panels = [
        {title for title in titles if title.startswith(f"{name}, Passkey, ")} for name in ("Original", "art-0", "art-1")
    ]
    assert all(len(panel) == len(panels[0]) > 1 for panel in panels)


def test_another_original_is_no_baseline() -> None:
    other = other_report()
    other["eval"]["rows"][0]["before"] = 21.0
    comparison = side_by_side(full_report(), other)
    row = row_of(comparison, "scores", "perplexity/perplexity@1024")
    assert row.entries[1].differs == ("score of the original: 21.00 ± 0.20, not 20.00 ± 0.20",)
    other["model"]["name"] = "org/Different"
    comparison = side_by_side(full_report(), other)
    assert all(not row.comparable(1) for row in comparison.rows)
    assert "made from different models" in page(full_report(), other).all("header")[0].text()


def test_a_figure_that_only_one_of_them_has() -> None:
    bare = other_report()
    del bare["eval"], bare["efficiency"], bare["weights"]
    comparison = side_by_side(bare, full_report())
    row = row_of(comparison, "scores", "piqa/acc")
    assert row.entries[0] is None
    assert row.entries[1] is not None
    assert row.original == 0.51
    assert page(bare, full_report(), bare).all("figure")


def test_the_page_has_tiles_and_a_series_for_each() -> None:
    root = page(full_report(), other_report(), full_report())
    assert [heading.text() for heading in root.all("h2")[:3]] == ["art-0", "art-1", "art-2"]
    tiles = [element for element in root.all("div") if "tile" in element.attributes.get("class", "").split()]
    assert len(tiles) == 12
    for name in ("size", "scores", "agreement", "needles", "speed", "kv", "errors"):
        for cells in table_rows(section(root, name)):
            assert len(cells) in (4, 5)
    keys = [key.text() for key in section(root, "errors").all("li")]
    assert [key.split()[-1] for key in keys] == ["art-0", "art-1", "art-2"]
    titles = [element.text() for element in section(root, "size").all("svg")[0].all("title")]
    assert "art-1: 60.0 MB, 60.0 %" in titles


def test_what_to_know_of_the_ratios_is_told_for_each() -> None:
    other = other_report()
    other["efficiency"]["notes"] = ["the file is itself quantized"]
    told = section(page(full_report(), other), "speed").text()
    assert "art-0: Transformers unpacked the weights while loading." in told
    assert "art-1: The file is itself quantized." in told
    assert "Peak memory while answering" in told


def test_what_all_share_is_told_once() -> None:
    other = other_report()
    other["seed"] = 99
    part = section(page(full_report(), other), "origin")
    assert table_rows(part) == [["Seed", "17", "99"]]
    assert part.text().count("org/Small-100M") == 1


def test_empty_reports_make_a_page() -> None:
    assert page({}, {}).all("h1")


def test_as_a_table_and_as_json() -> None:
    other = other_report()
    other["eval"]["rows"][1]["n"] = 100
    comparison = side_by_side(full_report(), other)
    lines = comparison.lines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + len(comparison.rows)
    assert lines[-1] == "[1] not compared, measured differently: items: 100, not 500"
    assert sum("[1]" in line for line in table) == 1
    data = json.loads(json.dumps(comparison.to_json()))
    assert data["schema"] == "compress.comparison/1"
    assert data["artifacts"] == ["art-0", "art-1"]
    assert data["rows"][0]["entries"][1]["value"] == 60e6
