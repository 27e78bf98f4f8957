"""The model card: front matter as the Hub reads it, and a body that says nothing wrong whatever a run had or lacked."""

import copy
import json
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from compress.artifact.card import eval_results, front_matter, model_card

MODULES = [{"name": "model.layers.0.mlp.up_proj", "bits": 3}, {"name": "model.layers.0.mlp.down_proj", "bits": 8}]
REPORT: dict[str, Any] = {
    "model": {
        "name": "M",
        "source": "org/model",
        "hub_id": "org/model",
        "parents": [],
        "license": "mit",
        "license_name": None,
        "license_link": None,
        "languages": ["en"],
    },
    "recipe": {"name": "rsq", "description": "RSQ, 3 bits", "calibration": {"source": "org/texts::train"}},
    "seed": 5,
    "command": "compress run --model org/model --recipe rsq",
    "versions": {"compress": "0.1.0", "torch": "2.13.0"},
    "calibration": {"source": "org/texts::train", "origin": "9 documents of org/texts", "hub_dataset": "org/texts"},
    "weights": {
        "modules": MODULES,
        "rotation": {"residual": "Hadamard 64", "heads": "none"},
        "untied": True,
        "degraded": ["model.layers.0.mlp.down_proj"],
    },
    "artifact": {
        "format": "compressed-tensors",
        "weight_bytes": 5_000_000,
        "bits_per_weight": 4.0,
        "bytes_16bit": 20_000_000,
        "formats": {"compressed-tensors": {"path": ".", "weight_bytes": 5_000_000}},
    },
}
EVAL: dict[str, Any] = {
    "table": "| task | metric | before | after |\n|---|---|---:|---:|\n| piqa | acc ↑ | 0.7 ± 0.1 | 0.6 ± 0.1 |",
    "note": "Perplexity in windows of 64 tokens, on WikiText-2.",
    "rows": [
        {"task": "perplexity", "metric": "perplexity@64", "after": 22.123456789, "ratio": 1.1},
        {"task": "piqa", "metric": "acc", "after": 0.6, "ratio": 0.9},
        {"task": "piqa", "metric": "acc_norm", "after": 0.65, "ratio": 0.9},
        {"task": "gsm8k", "metric": "exact_match,strict-match", "after": 0.0, "ratio": None},
        {"task": "arc", "metric": "acc", "after": None, "ratio": None},
    ],
    "after": {"text": "Salesforce/wikitext:wikitext-2-raw-v1:test:text"},
}


def report(**changes: Any) -> dict[str, Any]:
    """A report with other sections; ``section__key`` changes one key."""
    made = copy.deepcopy(REPORT)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            made[section][key] = value
        else:
            made[section] = value
    return made


def front(card: str) -> dict[str, Any]:
    """The card's metadata, by the expression with which the Hub's library finds it."""
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    assert ModelCard(card).data.to_dict() == found
    return found


def test_front_matter_of_a_hub_model() -> None:
    found = front(model_card(report(eval=EVAL), "tiny", "acme/tiny", "acme"))
    assert found["base_model"] == "org/model"
    assert found["base_model_relation"] == "quantized"
    assert found["datasets"] == ["org/texts"]
    assert found["license"] == "mit"
    assert found["language"] == ["en"]
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["quantized_by"] == "acme"
    assert found["tags"] == ["compressed-tensors", "rsq", "3-bit", "8-bit"]


def test_what_isnt_known_is_left_out() -> None:
    model = REPORT["model"] | {"source": "/home/jane/m", "hub_id": None, "license": None, "languages": []}
    text = model_card(report(model=model, calibration=None), "tiny")
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "M, compressed with recipe rsq: RSQ, 3 bits." in text
    assert "calibration: none" in text
    assert "jane" not in text
    assert "None" not in text


def test_licences_that_the_hub_doesnt_know_are_named() -> None:
    named = {"license": "other", "license_name": "llama3", "license_link": "https://x.y/LICENSE"}
    found = front(model_card(report(model=REPORT["model"] | named), "t"))
    assert {key: found[key] for key in named} == named
    known = front(model_card(report(model=REPORT["model"] | named | {"license": "mit"}), "t"))
    assert "license_name" not in known
    assert front(model_card(report(model__license=["mit", "apache-2.0"]), "t"))["license"] == ["mit", "apache-2.0"]


def test_results_are_a_model_index_that_reads_back() -> None:
    card = ModelCard(model_card(report(eval=EVAL), "tiny"))
    assert card.data.model_name == "tiny"
    assert card.data.eval_results == eval_results(report(eval=EVAL))
    found = {(result.dataset_type, result.metric_type): result for result in card.data.eval_results}
    assert found.keys() == {
        ("Salesforce/wikitext", "perplexity"),
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("gsm8k", "exact_match"),
    }
    text = found["Salesforce/wikitext", "perplexity"]
    assert (text.metric_value, text.metric_name) == (22.1235, "perplexity (64)")
    assert (text.dataset_config, text.dataset_split) == ("wikitext-2-raw-v1", "test")
    assert found["gsm8k", "exact_match"].metric_name == "exact_match (strict-match)"
    assert all(result.task_type == "text-generation" for result in card.data.eval_results)


@pytest.mark.parametrize(("text", "name"), [("pydoc", "pydoc"), ("my text.jsonl", "my text.jsonl"), (None, "text")])
def test_texts_that_are_no_dataset(text: str | None, name: str) -> None:
    (result,) = eval_results(report(eval=EVAL | {"rows": EVAL["rows"][:1], "after": {"text": text}}))
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == (name, name, None)


def test_no_results_no_index() -> None:
    text = model_card(report(), "t")
    assert "model-index" not in text
    assert "## Results" not in text
    assert "Its quality was not measured" in text


def test_the_results_stand_in_the_body() -> None:
    cells = [{"task": "passkey", "length": 2048, "depth": depth, "score": depth, "n": 1} for depth in (0.0, 1.0)]
    evaluation = EVAL | {
        "divergence": {
            "mean_kl": 0.123,
            "kl_stderr": 0.01,
            "top1_agreement": 0.9,
            "greedy": {"prompts": 8, "changed_answers": 0.375},
        },
        "long_context": {"before": cells, "after": cells},
    }
    rows = [
        {"metric": "weight_bytes_on_disk", "unit": "bytes", "baseline": 2e7, "model": 5e6}
        | {"ratio": 0.25, "ratio_low": 0.25, "ratio_high": 0.25},
        {"metric": "decode_tokens_per_second", "unit": "tokens/s", "baseline": 10.0, "model": 12.0}
        | {"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3},
    ]
    efficiency = {"device": "cpu", "baseline": "dense", "rows": rows, "notes": ["the file is itself quantized"]}
    text = model_card(report(eval=evaluation, efficiency=efficiency), "t")
    for words in (
        EVAL["table"],
        "on WikiText-2.",
        "mean KL divergence 0.123 ± 0.0100 nats a token",
        "90.0 %; 37.5 % of 8 greedy answers changed.",
        "| passkey | 2048 | 50 % | 50 % |",
        "| Weights on disk | 20.0 MB | 5.00 MB | 0.25× |",
        "| Writing speed | 10.0 tokens/s | 12.0 tokens/s | 1.20× (1.10×-1.30×) |",
        "\n\nThe file is itself quantized.\n\n## Use",
        "Perplexity on the text above went up by 10.0 %.",
        "Where the original fails to find a fact",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "3 passes over the calibration text. On held-out text the KL divergence fell from 0.200 to 0.150 nats"),
        ({"kept": False, "epochs": 1}, "1 pass over the calibration text. On held-out text the KL divergence didn't"),
        ({"held_out": None}, "There was no second window of text to hold out, so the gain isn't known\n"),
    ],
)
def test_the_body_says_in_a_line_what_was_tuned(changes: dict[str, Any], words: str) -> None:
    held = {"windows": 1, "kl_before": 0.2, "kl_after": 0.15}
    tuning = {"epochs": 3, "steps": 24, "kl_by_epoch": [0.2], "held_out": held, "kept": True} | changes
    text = model_card(report(weights=REPORT["weights"] | {"tuning": tuning}), "t")
    (line,) = [line for line in text.splitlines(keepends=True) if line.startswith("- scales and norms tuned")]
    assert words in line
    assert "tuned" not in model_card(report(weights=REPORT["weights"] | {"tuning": None}), "t")


def test_the_body_says_how_to_load_and_how_it_was_made() -> None:
    text = model_card(report(), "tiny", "acme/tiny")
    for words in (
        "[org/model](https://huggingface.co/org/model)",
        "| weights on disk | 20.0 MB at 16 bits | 5.00 MB |",
        'AutoModelForCausalLM.from_pretrained("acme/tiny")',
        "vllm serve acme/tiny",
        'compress.load("acme/tiny")',
        "compress generate acme/tiny --prompt",
        "compress run --model org/model --recipe rsq",
        "9 documents of org/texts",
        "seed: 5",
        "residual stream Hadamard 64",
        r"unusable: model.layers.0.mlp.down\_proj",
        "The hidden states are rotated",
        "Humming kernels for 2 and 3 bits",
    ):
        assert words in text
    plain = report()
    del plain["weights"]
    text = model_card(plain, "t")
    assert "rotated" not in text
    assert "Humming kernels for" not in text


def test_every_format_is_told_how_to_use() -> None:
    formats = {
        "compressed-tensors": {"path": ".", "weight_bytes": 5_000_000},
        "gptq": {"path": "gptq", "weight_bytes": 6_000_000},
        "gguf": {"path": "gguf", "weight_bytes": 7_000_000},
    }
    text = model_card(report(artifact=REPORT["artifact"] | {"formats": formats}), "tiny")
    assert front(text)["tags"][:3] == ["compressed-tensors", "gptq", "gguf"]
    for words in ("### gptq, 6.00 MB", 'from_pretrained("tiny", subfolder="gptq")', "gguf/model.gguf", "llama-cli"):
        assert words in text
    alone = REPORT["artifact"] | {"format": "gguf", "formats": {"gguf": {"path": ".", "weight_bytes": 1}}}
    text = model_card(report(artifact=alone), "tiny")
    assert front(text)["library_name"] == "gguf"
    assert "from transformers" not in text
    assert "`model.gguf`" in text


@pytest.mark.parametrize(
    "name",
    [
        "title: of a card",
        "a | b",
        "[x](http://evil)",
        "<script>alert(1)</script>",
        "line one\n---\nline two: {{ 3 * 4 }}",
        "# heading `code` *bold*",
        "quotes \" and ' and \\",
        "naïve 模型",
        "null",
        "3.10",
    ],
)
def test_names_are_never_markup(name: str) -> None:
    model = REPORT["model"] | {"name": name, "hub_id": None, "source": name}
    made = report(model=model, eval=EVAL, calibration__origin=name, recipe__description=name, command=f"x ```\n{name}")
    text = model_card(made, name)
    assert front(text)["model-index"][0]["name"] == " ".join(name.split())
    body = ModelCard(text).text
    (heading,) = re.findall(r"^# .*", body, re.MULTILINE)[:1]
    assert re.sub(r"\\(.)", r"\1", heading) == "# " + " ".join(name.split())
    prose = "".join(re.split(r"^(`{3,}).*?^\1$", body, flags=re.MULTILINE | re.DOTALL)[::2])
    assert "<script>" not in prose.replace(r"\<script\>", "")
    assert "](http://evil)" not in prose.replace(r"\]", "")
    assert f"from_pretrained({json.dumps(' '.join(name.split()), ensure_ascii=False)})" in body


def test_no_local_path_is_in_a_card() -> None:
    made = report(
        model=REPORT["model"] | {"source": "/home/jane/my models/base", "hub_id": None},
        recipe=REPORT["recipe"] | {"calibration": {"source": "/home/jane/my texts/a.jsonl"}},
        calibration={"source": "/home/jane/my texts/a.jsonl", "origin": "9 documents of /home/jane/my texts/a.jsonl"}
        | {"hub_dataset": None},
        command="compress run --model '/home/jane/my models/base' --calibration '/home/jane/my texts/a.jsonl'",
        eval=EVAL | {"note": "Perplexity on /home/jane/texts/b.txt.", "after": {"text": "/home/jane/texts/b.txt"}},
    )
    text = model_card(made, "t")
    assert "jane" not in text
    assert "my texts" not in text
    assert "compress run --model base --calibration a.jsonl" in text
    assert front(text)["model-index"][0]["results"][0]["dataset"]["name"] == "b.txt"


def test_front_matter_is_what_the_library_makes_of_it() -> None:
    text = front_matter(report(eval=EVAL), "tiny", "acme")
    data = yaml.safe_load(text)
    assert ModelCardData(**copy.deepcopy(data)).to_dict() == data
