"""The model card: ``README.md`` of an artifact, with the Hub's front matter."""

from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined


def model_card(report: dict[str, Any], title: str, description: str) -> str:
    """The text of the card.

    Args:
        report: the content of ``report.json``.
        title: name of the artifact's folder.
        description: the recipe in a few words, used in the first sentence.
    """
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        (files("compress.artifact") / "card.md.j2").read_text(encoding="utf-8")
    )
    weights = report.get("weights", {})
    model = report["model"]
    calibration = report["calibration"]
    rotation = weights.get("rotation", {"residual": "none", "heads": "none"})
    evaluation = report.get("eval") or {}
    made = [f"rotations: residual stream {rotation['residual']}, value heads {rotation['heads']}"]
    if weights.get("degraded"):
        made.append(
            f"rounded to nearest, because their calibration inputs were unusable: {', '.join(weights['degraded'])}"
        )
    return template.render(
        front_matter=_front_matter(report),
        title=title,
        base_name=model["name"],
        base_link=f"https://huggingface.co/{model['hub_id']}" if model["hub_id"] else None,
        report=report,
        summary=description,
        table=evaluation.get("table"),
        measured_on=evaluation.get("note", ""),
        narrow=any(module["bits"] < 4 for module in weights.get("modules", [])),
        calibration=calibration["origin"] if calibration else "none",
        made=made,
        rotated=rotation["residual"] != "none",
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    )


def _front_matter(report: dict[str, Any]) -> str:
    model = report["model"]
    bits = sorted({f"{module['bits']}-bit" for module in report.get("weights", {}).get("modules", [])})
    data = ModelCardData(
        base_model=model["hub_id"],
        license=model["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compressed-tensors", report["recipe"]["name"], *bits],
        datasets=report["calibration"]["hub_dataset"] if report["calibration"] else None,
    ).to_dict()
    if model["hub_id"]:
        data["base_model_relation"] = "quantized"
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
