"""The model card: ``README.md`` of an artifact, with the Hub's front matter.

A card is made to be published, so it is made from :func:`compress.artifact.privacy.shareable`: no local path is in it.
"""

import json
import re
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from compress.artifact.privacy import shareable
from compress.calibrate.text import PYDOC, is_local
from compress.evalsuite.catalogue import PERPLEXITY
from compress.evalsuite.report.costs import notes
from compress.evalsuite.report.glossary import efficiency
from compress.evalsuite.report.needles import fields, mean_by_length
from compress.evalsuite.report.tuning import tuning_clause
from compress.evalsuite.report.wording import is_number, listed, nbytes, number, percent, quantity, times

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")
_TITLE = re.compile(r"^# (.*)$", re.MULTILINE)
_LIBRARIES = {"gguf": "gguf"}


def model_card(report: dict[str, Any], title: str, place: str | None = None, author: str | None = None) -> str:
    """The text of the card.

    Args:
        report: the content of ``report.json``; sections that a run didn't have may be absent.
        title: name of the model.
        place: what to load it by: the folder's name, or its repository on the Hub. By default the title.
        author: the account on the Hub that publishes it, if it is known.
    """
    report = shareable(report)
    artifact, calibration = report["artifact"], report["calibration"]
    evaluation = report.get("eval") or {}
    return _template().render(
        front_matter=front_matter(report, title, author),
        title=title,
        place=_line(place or title),
        report=report,
        base=_base(report["model"]),
        parents=listed([_link(parent) for parent in report["model"].get("parents", [])]),
        original=f"{nbytes(artifact['bytes_16bit'])} at 16 bits",
        size=nbytes(artifact["weight_bytes"]),
        formats=artifact.get("formats") or {artifact["format"]: {"path": "."} | artifact},
        nbytes=nbytes,
        packed=bool(report.get("weights", {}).get("modules")),
        kv=report.get("kv"),
        shared=bool(artifact.get("shared_layers")),
        table=evaluation.get("table"),
        measured_on=evaluation.get("note", ""),
        divergence=_divergence(evaluation.get("divergence")),
        needles=_needles(evaluation.get("long_context")),
        speed=_speed(report.get("efficiency")),
        speed_notes=notes(report),
        calibration=calibration["origin"] if calibration else "none",
        made=_made(report),
        limits=_limits(report),
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    )


def front_matter(report: dict[str, Any], title: str, author: str | None = None) -> str:
    """The card's metadata by the Hub's conventions, as YAML; what isn't known is left out."""
    model, calibration = report["model"], report["calibration"]
    modules = report.get("weights", {}).get("modules", [])
    formats = list(report["artifact"].get("formats") or [report["artifact"]["format"]])
    bits = sorted({f"{module['bits']}-bit" for module in modules})
    other = model["license"] == "other"
    dataset = calibration["hub_dataset"] if calibration else None
    results = eval_results(report)
    data = ModelCardData(
        language=model.get("languages") or None,
        license=model["license"],
        license_name=model.get("license_name") if other else None,
        license_link=model.get("license_link") if other else None,
        library_name=_LIBRARIES.get(formats[0], "transformers"),
        pipeline_tag="text-generation",
        base_model=model["hub_id"],
        base_model_relation="quantized" if model["hub_id"] else None,
        datasets=[dataset] if dataset else None,
        tags=[*formats, _line(report["recipe"]["name"]), *bits, *(["kv-cache"] if report.get("kv") else [])],
        quantized_by=author,
        model_name=_line(title),
        eval_results=results or None,
    ).to_dict()
    if not results:
        data.pop("model_name", None)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120).strip()


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """What was measured on the compressed model, for ``model-index``; figures that aren't finite are left out."""
    evaluation = report.get("eval") or {}
    text = (evaluation.get("after") or {}).get("text")
    found = []
    for row in evaluation.get("rows", []):
        if not is_number(row["after"]):
            continue
        kind, _, rest = re.sub("[@,]", " ", row["metric"]).partition(" ")
        detail = "" if rest in ("", "none") else f" ({rest})"
        dataset, config, split = _dataset(text) if row["task"] == PERPLEXITY else (row["task"], None, None)
        found.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_config=config,
                dataset_split=split,
                metric_type=kind,
                metric_name=kind + detail,
                metric_value=float(f"{row['after']:.6g}"),
            )
        )
    return found


def _dataset(text: str | None) -> tuple[str, str | None, str | None]:
    """The text of a perplexity: a dataset with its config and split, or a name alone."""
    if text is None or text == PYDOC or is_local(text) or "/" not in text:
        return text or "text", None, None
    name, config, split = [*text.split(":"), "", ""][:3]
    return name, config or None, split or None


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters |= {"md": _md, "code": _code, "py": _literal, "sh": shlex.quote}
    return environment.from_string((files("compress.artifact") / "card.md.j2").read_text(encoding="utf-8"))


def titled(card: str) -> str | None:
    """The name in the title of a card; None if it has none."""
    title = _TITLE.search(card)
    return None if title is None else re.sub(r"\\(.)", r"\1", title[1])


def _base(model: dict[str, Any]) -> str:
    return _link(model["hub_id"]) if model["hub_id"] else _md(model["name"])


def _link(repo: str) -> str:
    return f"[{_md(repo)}](https://huggingface.co/{repo})"


def _divergence(found: Mapping[str, Any] | None) -> str | None:
    if not found:
        return None
    error = "" if found["kl_stderr"] is None else f" ± {number(found['kl_stderr'])}"
    text = (
        f"Against the original, token by token: mean KL divergence {number(found['mean_kl'])}{error} nats a token, "
        f"the same likeliest token in {percent(found['top1_agreement'])}"
    )
    greedy = found.get("greedy")
    if greedy:
        text += f"; {percent(greedy['changed_answers'])} of {greedy['prompts']} greedy answers changed"
    return f"{text}."


def _needles(found: Mapping[str, Any] | None) -> list[tuple[str, int, str, str]]:
    """Task, length, mean score before and after; one row a task and length."""
    if not found:
        return []
    before, after = fields(found["before"]), fields(found["after"])
    rows = []
    for task in dict.fromkeys(task for task, _, _ in after):
        old = mean_by_length(before, task)
        rows += [
            (task, length, percent(old.get(length), 0), percent(score, 0))
            for length, score in mean_by_length(after, task).items()
        ]
    return rows


def _speed(found: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Metric, baseline, model and their ratio with its range."""
    rows = []
    for row in (found or {}).get("rows", []):
        spread = (
            "" if row["ratio_low"] == row["ratio_high"] else f" ({times(row['ratio_low'])}-{times(row['ratio_high'])})"
        )
        figures = (quantity(row["baseline"], row["unit"]), quantity(row["model"], row["unit"]))
        rows.append((efficiency(row["metric"])[0], *figures, times(row["ratio"]) + spread))
    return rows


def _made(report: dict[str, Any]) -> list[str]:
    """What was done beyond the recipe's name."""
    weights = report.get("weights", {})
    rotation = weights.get("rotation", {"residual": "none", "heads": "none"})
    made = [f"rotations: residual stream {rotation['residual']}, value heads {rotation['heads']}"] if weights else []
    if carried := report.get("carried"):
        made.append(f"weights taken over byte for byte, as they were made with recipe {_md(carried['name'])}")
    elif not weights:
        made.append("weights: the original's own")
    if kv := report.get("kv"):
        made.append(f"KV cache: {_md(kv['summary'])}")
    if tuned := tuning_clause(report):
        made.append(tuned)
    if weights.get("untied"):
        made.append("the output head, which the original shares with the embedding, is stored apart")
    if weights.get("degraded"):
        names = ", ".join(_md(name) for name in weights["degraded"])
        made.append(f"rounded to nearest, because their calibration inputs were unusable: {names}")
    return made


def _limits(report: dict[str, Any]) -> list[str]:
    """What a user of this model should know before relying on it."""
    evaluation, weights = report.get("eval") or {}, report.get("weights", {})
    limits = ["Quantization changes a model's answers, and nothing that the original can't do is gained."]
    for row in evaluation.get("rows", []):
        if row["task"] == PERPLEXITY and is_number(row["ratio"]):
            change = 100 * (row["ratio"] - 1)
            limits.append(
                f"Perplexity on the text above went {'up' if change >= 0 else 'down'} by {abs(change):.1f} %."
            )
    limits.append(
        "What is measured above was measured on that text or those tasks alone; measure your own use before you rely"
        " on it."
        if evaluation
        else "Its quality was not measured; measure your own use before you rely on it."
    )
    if evaluation.get("long_context"):
        limits.append(
            "Where the original fails to find a fact in a long text, this model can't be expected to find it."
        )
    if report["calibration"]:
        limits.append("Calibrated on the text named above: on other languages or domains the loss can be larger.")
    if weights.get("rotation", {}).get("residual", "none") != "none":
        limits.append(
            "The hidden states are rotated: adapters, draft heads or probes that were trained on the original's hidden"
            " states don't fit."
        )
    if report["artifact"]["format"] != "gguf" and weights:
        limits.append(
            "Plain transformers unpacks the weights before it computes: the file is smaller, speed isn't gained."
        )
    if report.get("kv"):
        limits.append("Only the tool that made it packs the KV cache; plain transformers and vLLM keep 16 bits.")
    if any(module["bits"] < 4 for module in weights.get("modules", [])):
        limits.append("vLLM needs its Humming kernels for 2 and 3 bits.")
    return limits


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _md(text: str) -> str:
    """One line of plain text in Markdown: nothing in it is markup."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def _literal(text: str) -> str:
    """A string of Python."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """A fenced block that its content can't close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
