"""What a model whose layers share attention lacks, and its ``config.json``, which nothing but ``compress.load`` reads.

Plain ``from_pretrained`` would fill the dropped projections with random numbers, and say so in a warning only. So such
a config names a model type that transformers doesn't know, in words, and for those who ask for a class by its name an
activation that no library has. Both are kept beside them. Which layers share stands in the attention plan alone.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from compress.calibrate.errors import InputError
from compress.families import FAMILIES, Family
from compress.plan import FILE, AttentionPlan, Share, read_plan

MARK = "compress_shared"
"""Key of a config: what ``model_type`` and ``hidden_act`` are."""

_HELD = {"family": "model_type", "activation": "hidden_act"}  # a ``model_type`` in there would be taken for a config

DROPPED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attn": ("q_proj", "k_proj", "q_norm", "k_norm"), "kv": ("k_proj", "v_proj", "k_norm"), "mask": ()}
)
"""Modules of a consumer's attention that it has no use for, by mode."""


def kept(shapes: Mapping[str, tuple[int, ...]], family: Family, share: Share | None) -> dict[str, tuple[int, ...]]:
    """Of the parameters of one decoder layer, shapes by names relative to it, those that it has if it shares.

    With a score residual these are some rows of the query and key projections, too.
    """
    if share is None or not DROPPED[share.mode]:
        return dict(shapes)
    rows: dict[str, int] = {}
    if share.residual is not None:
        heads = {"q_proj": len(share.residual.gain), "k_proj": len(share.residual.planes)}
        rows = {f"{family.attention}.{module}.": count * share.rank for module, count in heads.items()}
    gone = tuple({f"{family.attention}.{module}." for module in DROPPED[share.mode]} - set(rows))
    found = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    for part, count in rows.items():
        found |= {name: (count, *shape[1:]) for name, shape in found.items() if name.startswith(part)}
    return found


def shares_of(plan: AttentionPlan | None) -> dict[int, Share]:
    """The layers of a plan that have given up weights."""
    layers = () if plan is None else plan.layers
    return {
        index: layer.share
        for index, layer in enumerate(layers)
        if layer.share is not None and DROPPED[layer.share.mode]
    }


def marked(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json`` of a model with shared layers."""
    kind = content["model_type"]
    words = f"{kind} with shared attention layers (open it with compress.load, transformers can't run it)"
    held = {name: content[key] for name, key in _HELD.items()}
    return {**content, "model_type": words, "hidden_act": "shared attention: open it with compress.load", MARK: held}


def unmarked(content: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`marked`; any other content as it is."""
    held = content.get(MARK, {})
    plain = {key: value for key, value in content.items() if key != MARK}
    return plain | {key: held[name] for name, key in _HELD.items() if name in held}


def folder_config(folder: Path, content: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a folder, whether its layers share or not.

    Args:
        folder: of the model.
        content: of its ``config.json``.

    Raises:
        InputError: of a model with shared layers that isn't of one of our families.
    """
    if MARK not in content:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        return config
    plain = unmarked(content)
    if plain["model_type"] not in FAMILIES:
        raise InputError("--model", folder, f"its layers share attention, in a {plain['model_type']!r}")
    found: PreTrainedConfig = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    return found


def folder_shares(folder: Path, content: Mapping[str, Any]) -> dict[int, Share]:
    """The layers of a folder's model that share; empty where its config isn't marked.

    Raises:
        InputError: the plan that says it is missing, or says nothing.
    """
    if MARK not in content:
        return {}
    found = shares_of(read_plan(folder))
    if not found:
        fix = "copy the whole folder again"
        raise InputError("--model", folder, f"its layers share attention, and its {FILE} doesn't say which", fix=fix)
    return found
