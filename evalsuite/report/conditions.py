"""What must be equal for two reports' figures to be comparable: the original, the text, how the questions were put."""

import hashlib
from collections.abc import Mapping
from typing import Any

from compress.evalsuite.catalogue import DIVERGENCE, LONG_CONTEXT, PERPLEXITY
from compress.evalsuite.report.findings import Finding
from compress.evalsuite.report.wording import dig


def score_conditions(report: Mapping[str, Any], one: Finding) -> dict[str, str]:
    """Those of a task's score."""
    if one.task in LONG_CONTEXT:
        asked = needle_facts(report)
    elif one.task in (PERPLEXITY, DIVERGENCE):
        asked = text_facts(report)
    else:
        asked = _question_facts(report, one)
    return texts({**base_model(report), "items": one.n, **asked})


def text_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """The text of perplexity and divergence, by name and by its tokens, and how it is cut."""
    settings = _eval_settings(report)
    window, stride, prompt = (settings.get(key) for key in ("window", "stride", "kv_prompt"))
    return {
        "text": dig(report, "eval", "text"),
        "tokens of the text": _short(dig(report, "eval", "after", "text_tokens")),
        "window": window,
        "stride": None if stride == window else stride,
        "prompt before the cache is measured": prompt,
        "tokens at once through the cache": None if prompt is None else settings.get("kv_chunk"),
    }


def needle_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Which long-context questions were asked, beside their task and length."""
    found = dig(report, "eval", "long_context") or {}
    facts = {key: found.get(key) for key in ("depths", "samples", "seed", "haystack")}
    return facts | {"text of the haystack": _short(dig(report, "eval", "after", "haystack"))}


def _question_facts(report: Mapping[str, Any], one: Finding) -> dict[str, Any]:
    """What lm-eval's questions were, and how they were put."""
    settings, after = _eval_settings(report), dig(report, "eval", "after")
    chat = bool(settings.get("apply_chat_template"))
    return {
        "examples in the prompt": settings.get("num_fewshot"),
        "limit": settings.get("limit") if one.n is None else None,
        "version of the task": dig(after, "harness", "versions", one.task),
        "questions": _documents(after, one.task),
        "chat template": "yes" if chat else "no",
        "examples as turns of their own": settings.get("fewshot_as_multiturn") if chat else None,
        "system instruction": settings.get("system_instruction"),
        "longest prompt": settings.get("max_length"),
    }


def _documents(after: Any, task: str) -> str:
    """A hash of a task's documents; of a group, one over those of its tasks; empty where the report keeps none."""
    own = dig(after, "documents", task)
    if own:
        return _short(own)
    members = [_documents(after, name) for name in dig(after, "harness", "group_subtasks", task) or [] if name != task]
    return hashlib.sha256("".join(members).encode()).hexdigest()[:12] if any(members) else ""


def _eval_settings(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """All settings of the evaluation: those that were asked for, and those that the scores were made with."""
    return (dig(report, "eval", "settings") or {}) | (dig(report, "eval", "after", "settings") or {})


def error_conditions(report: Mapping[str, Any]) -> dict[str, str]:
    """Errors depend on the text that they were measured on."""
    return texts(base_model(report) | {"calibration text": _short(dig(report, "calibration", "digest"))})


def base_model(report: Mapping[str, Any]) -> dict[str, str]:
    """The original: its name without the owner, and a hash over the contents of its files."""
    name = model_name(report)
    hashes = dig(report, "fingerprint", "model")
    if not hashes:
        return {"original": name}
    whole = hashlib.sha256("".join(sorted(map(str, hashes.values()))).encode()).hexdigest()
    return {"original": f"{name} ({whole[:8]})"}


def model_name(report: Mapping[str, Any]) -> str:
    """The original's name, without its owner."""
    return str(dig(report, "model", "name") or "unknown").rpartition("/")[2]


def _short(digest: Any) -> str:
    """The beginning of a hash; empty where there is none."""
    return str(digest or "")[:12]


def texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as conditions; what isn't known is left out."""
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}
