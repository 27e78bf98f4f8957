"""The page of one artifact, read as HTML."""

import json
import re
from copy import deepcopy
from typing import Any

import pytest
from compress.evalsuite.report import SECTIONS, render
from html_reader import Element, elements, read
from report_builders import KINDS, LAYERS, full_report, row

KEPT = ("metric", "task", "unit")
EVIL = "<script>alert('x')</script> & \"quoted\" $a_b$ 汉"


def section(root: Element, name: str) -> Element:
    (found,) = [element for element in root.all("section") if element.attributes.get("id") == name]
    return found


def names(root: Element) -> list[str]:
    return [element.attributes["id"] for element in root.all("section") if "id" in element.attributes]


def table_rows(part: Element, index: int = 0) -> list[list[str]]:
    body = part.all("table")[index].all("tbody")[0]
    return [[cell.text() for cell in line.children] for line in body.all("tr")]


def tiles(root: Element) -> dict[str, str]:
    found = [element for element in root.all("div") if "tile" in element.attributes.get("class", "").split()]
    return {tile.all("dt")[0].text(): tile.all("dd")[0].text() for tile in found}


@pytest.fixture(scope="module")
def page() -> Element:
    return read(render(full_report(), "Small-W3"))


def test_every_section_is_there_with_a_sentence_that_says_which_way_is_better(page: Element) -> None:
    quality, cost, trust = ["scores", "divergence", "needles"], ["size", "speed", "kv"], ["check", "origin"]
    assert names(page) == [*quality, *cost, "errors", "bits", "tuning", *trust]
    better = re.compile(r"better|best|smaller|rounding only|repeat the run")
    for name in names(page):
        part = section(page, name)
        assert part.all("h2")[0].text()
        lead = next(element for element in part.all("p") if element.attributes.get("class") == "lead")
        assert better.search(lead.text()), name


def test_nothing_is_fetched_and_nothing_runs(page: Element) -> None:
    for element in elements(page):
        assert element.tag not in ("script", "iframe", "img", "object", "embed")
        assert not any(name.startswith("on") for name in element.attributes)
        for name in ("href", "src"):
            assert element.attributes.get(name, "#").startswith(("#", "data:"))
    text = render(full_report(), "x")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_tiles(page: Element) -> None:
    found = tiles(page)
    assert found["Size"] == "80.0 MB 2.50× smaller than at 16 bits (200 MB)"
    assert found["Bits per weight"].startswith("6.40 over the whole file")
    assert found["Quality kept"] == "81.2 % of next tokens are the original's choice; perplexity 20.00 → 22.00"
    assert found["Speed"].startswith("0.80× the original's writing speed")


def test_scores_say_what_chance_explains(page: Element) -> None:
    perplexity, arc, arc_norm, piqa = table_rows(section(page, "scores"))
    assert perplexity[1:4] == ["20.00 ± 0.20", "22.00 ± 0.20", "+10.0 %"]
    assert perplexity[4] == "Worse; chance hardly explains it (p < 0.001)"
    assert arc[1:4] == ["55.0 ± 0.6 %", "50.0 ± 0.6 %", "−5.0 points"]
    assert "guessing gives 25 %" in arc[0]
    assert arc[4] == "Worse; chance hardly explains it (p = 0.004)"
    assert arc_norm[4] == "No clear difference; chance alone would explain it (p = 0.40)"
    assert piqa[4] == "Better; chance hardly explains it (p = 0.02)"
    told = section(page, "scores").text()
    assert "Only the first 500 items" in told
    assert "The original itself is hardly better than guessing on PIQA" in told
    verdict = page.all("header")[0].text()
    assert "clearly worse on Perplexity and ARC-Easy, clearly better on PIQA" in verdict


def test_heads_that_rest_on_the_first_token() -> None:
    report = full_report()
    for key in ("weights", "tuning", "efficiency"):
        report.pop(key, None)
    report["eval"]["long_context"] = None

    def told() -> Element:
        rows = section(read(render(report, "x")), "divergence").all("tr")
        (line,) = [row for row in rows if row.text().startswith("Heads that rest")]
        return line

    assert "90.0 % → 84.5 % 16 pieces of text, 64 tokens each" in told().text()
    assert "more than 30 % of their attention" in told().text()
    assert any("bad" in span.attributes.get("class", "") for span in told().all("span"))
    report["eval"]["sinks"]["after"] = 85.5
    assert not any("bad" in span.attributes.get("class", "") for span in told().all("span"))
    report["eval"]["sinks"] = None
    assert "first token" not in section(read(render(report, "x")), "divergence").text()


def test_the_worst_modules_come_first(page: Element) -> None:
    rows = table_rows(section(page, "errors"))
    assert len(rows) == LAYERS * len(KINDS)
    assert rows[0][0] == "model.layers.3.mlp.down_proj"
    assert rows[-1][0] == "model.layers.0.self_attn.q_proj"
    assert rows[-1][1] == "0.100 %"
    titles = [element.text() for element in section(page, "errors").all("svg")[0].all("title")]
    assert titles[0].startswith("model.layers.3.mlp.down_proj: ")
    assert len(titles) == 12


def test_maps_have_a_field_for_every_module(page: Element) -> None:
    for name, index in (("errors", 2), ("bits", 0)):
        for chart in section(page, name).all("svg")[index : index + 2]:  # wide, narrow
            fields = [path for path in chart.all("path") if path.children]
            assert len(fields) == LAYERS * len(KINDS)
    wide, narrow = section(page, "bits").all("svg")
    assert [element.text() for element in wide.all("text")].count("8") == 1
    assert float(wide.attributes["width"]) > float(wide.attributes["height"])
    assert float(narrow.attributes["width"]) <= 340
    assert "27 with 3 bits and 1 with 8 bits" in section(page, "bits").text()


def test_needles_show_the_ceiling_of_the_original(page: Element) -> None:
    part = section(page, "needles")
    told = part.text()
    assert "the original scores 62.5 %, the compressed model 50.0 % (−12.5 points)" in told
    assert "The original itself gets less than half of Variable tracking right" in told
    assert "at most 2 tests" in told
    titles = {element.text() for element in part.all("title")}
    assert "Passkey, 4k tokens, depth 50 %, compressed: 60 %" in titles
    assert "Passkey, 4k tokens, depth 50 %, original: 75 %" in titles
    assert ["Passkey", "4,096", "50 %", "75 %", "60 %", "2"] in table_rows(part)


def test_speed_and_memory_in_words(page: Element) -> None:
    disk, peak, first, writing = table_rows(section(page, "speed"))
    assert disk[3:] == ["0.40×", "Better: 2.50× smaller"]
    assert peak[0].startswith("Peak memory while answering the most held at any moment after loading")
    assert peak[4] == "Better: 1.67× smaller"
    assert first[4] == "No clear difference: the spread reaches over 1×"
    assert writing[3:] == ["0.80× 0.76 to 0.84×", "Worse: 0.80× as fast"]
    told = section(page, "speed").text()
    assert "cpu, 2 threads, float32" in told
    assert "Good to know: Transformers unpacked the weights while loading." in told
    assert "nothing is saved here" in section(page, "kv").text()


def test_tuning_says_what_it_brought(page: Element) -> None:
    part = section(page, "tuning")
    told = part.text()
    assert "On held-out text the KL divergence fell from 0.201 to 0.151 nats per token." in told
    assert "3, 24 steps in all" in told
    assert "0.0001" in told
    assert "1 min 35 s" in told
    assert table_rows(part) == [["1", "0.210"], ["2", "0.160"], ["3", "0.140"]]
    assert "pass 3: 0.140" in {element.text() for element in part.all("title")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": False}, "didn't fall (0.201 before, 0.151 after), so nothing that was learnt was kept"),
        ({"held_out": None}, "There was no second window of text to hold out, so the gain isn't known."),
        ({"kl_by_epoch": [0.2], "epochs": 1}, "1, 24 steps in all"),
        ({"kl_by_epoch": [None, None]}, "On held-out text the KL divergence fell"),
    ],
)
def test_tuning_that_brought_nothing_or_wasnt_measured(changes: dict[str, Any], words: str) -> None:
    report = full_report()
    report["weights"]["tuning"] |= changes
    part = section(read(render(report, "x")), "tuning")
    assert words in part.text()
    assert not part.all("svg") if "kl_by_epoch" in changes else part.all("svg")


def test_size_is_honest_about_a_small_source(page: Element) -> None:
    told = section(page, "size").text()
    assert "The file that was given (70.0 MB) is smaller than the result" in told
    assert ["Also as gguf", "90.0 MB", "2.22×"] in table_rows(section(page, "size"))


def test_how_it_was_made(page: Element) -> None:
    told = section(page, "origin").text()
    run = ("compress run --model models/small.gguf", "Seed 17", "torch 2.13.0", "bits: 3", "symmetric: true")
    for text in (*run, "c0ffee", "ab" * 32):
        assert text in told
    assert "16 windows of 1,024 tokens, 16,384 in all" in told
    assert "10 min 11 s" in told
    assert "Weights 3 bits, group size 64, symmetric" in told


def test_every_chart_and_table_has_a_name(page: Element) -> None:
    charts = page.all("svg")
    assert len(charts) == 2 * len(page.all("figure"))
    for chart in charts:
        assert chart.attributes["role"] == "img"
        assert chart.attributes["aria-label"]
        assert chart.all("path") or chart.all("use")
        assert chart.all("text")
    for table in page.all("table"):
        assert table.all("caption")[0].text()
        for line in table.all("tbody")[0].all("tr"):
            assert line.children[0].tag == "th"
            assert len(line.children) == len(table.all("thead")[0].all("th"))
    levels = [element.tag for element in elements(page) if re.fullmatch(r"h\d", element.tag)]
    assert levels == ["h1"] + ["h2"] * 11


def test_no_colour_is_fixed() -> None:
    """Everything that is drawn takes its colour from the theme."""
    root = read(render(full_report(), "x"))
    css = str(root.all("style")[0].content[0])
    for chart in root.all("svg"):
        for element in elements(chart):
            assert not re.search(r"#[0-9a-f]{3,6}", element.attributes.get("style", ""))
            for name in re.findall(r"var\(--([\w-]+)\)", element.attributes.get("style", "")):
                assert css.count(f"--{name}: #") == 2, name  # light and dark


def test_what_comes_from_outside_is_escaped() -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry if key in KEPT else spoil(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [spoil(entry) for entry in value]
        return value + EVIL if isinstance(value, str) else value

    report = spoil(full_report())
    report["artifact"]["files"] = {EVIL: {"bytes": 1, "sha256": EVIL}}
    report["versions"] = {EVIL: EVIL}
    report["eval"]["rows"].append(row(EVIL, EVIL, 0.5, 0.4, True, 0.01))
    text = render(report, EVIL)
    assert "<script" not in text
    root = read(text)
    assert root.all("h1")[0].text() == " ".join(EVIL.split())
    assert any(EVIL in element.text() for element in root.all("text"))  # in a chart, and $ is not mathematics


def made(report: dict[str, Any]) -> set[str]:
    return {section.name for make in SECTIONS if (section := make(report)) is not None}


@pytest.mark.parametrize("key", list(full_report()))
def test_every_section_is_optional(key: str) -> None:
    gone = {
        "weights": {"errors", "bits", "tuning"},
        "artifact": {"size"},
        "reload_check": {"check"},
        "eval": {"scores", "divergence", "needles"},
        "efficiency": {"speed", "kv"},
    }
    report = full_report()
    everything = made(report)
    report[key] = None
    assert everything - made(report) == gone.get(key, set())
    del report[key]
    assert everything - made(report) == gone.get(key, set())


@pytest.mark.parametrize("report", [{}, dict.fromkeys(full_report())])
def test_an_empty_report_is_a_page_that_says_so(report: dict[str, Any]) -> None:
    root = read(render(report, "nothing"))
    assert names(root) == []
    assert all("not measured" in text for text in tiles(root).values())


def test_a_report_of_the_first_version_without_the_newer_keys() -> None:
    report = full_report()
    for entry in report["eval"]["rows"]:
        del entry["higher_is_better"], entry["n"], entry["paired"]
    del report["eval"]["divergence"], report["eval"]["long_context"]
    del report["artifact"]["formats"], report["efficiency"]
    root = read(render(report, "x"))
    rows = table_rows(section(root, "scores"))
    assert rows[0][4] == "Worse; not tested against chance"  # of perplexity the direction is known
    assert rows[1][4] == "Changed; nobody says which way is better"
    assert tiles(root)["Quality"].startswith("1.10× the original's perplexity")


def test_figures_that_are_null() -> None:
    report = full_report()
    report["eval"]["rows"][0] |= {"after": None, "after_stderr": None, "delta": None, "ratio": None, "paired": None}
    report["eval"]["rows"][1]["before_stderr"] = None
    for module in report["weights"]["modules"]:
        module["relative_error"] = module["damp"] = None
    report["eval"]["long_context"]["after"][0]["score"] = None
    report["efficiency"]["rows"][0]["ratio"] = None
    report["efficiency"]["kv"] = []
    root = read(render(report, "x"))
    assert table_rows(section(root, "scores"))[0][2:] == [
        "not finite", "–", "Broken: the compressed model's figure isn't finite",
    ]  # fmt: skip
    assert "No errors were measured" in section(root, "errors").text()
    assert "kv" not in names(root)


def test_what_went_wrong_is_at_the_top() -> None:
    report = full_report()
    report["weights"]["modules"][0]["degraded"] = True
    report["weights"]["degraded"] = [report["weights"]["modules"][0]["name"]]
    root = read(render(report, "x"))
    assert "1 module could only be rounded to nearest" in root.all("header")[0].text()


def test_the_same_report_gives_the_same_page() -> None:
    report = full_report()
    kept = deepcopy(report)
    text = render(report, "x")
    assert report == kept
    assert text == render(json.loads(json.dumps(report)), "x")


def test_a_model_of_80_layers_gives_less_than_a_megabyte() -> None:
    report = full_report()
    first = report["weights"]["modules"][: len(KINDS)]
    report["weights"]["modules"] = [
        entry | {"name": entry["name"].replace(".0.", f".{layer}.")} for layer in range(80) for entry in first
    ]
    text = render(report, "x")
    assert "model.layers.79.mlp.down_proj" in text
    assert len(text) < 1_000_000
