"""What the stage ``share`` tells: the report's section, and its summary in a line."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.model import ModelView
from compress.plan import Share
from compress.schema import Sharing
from compress.share.config import kept
from compress.share.pairs import MODES
from compress.share.refit import Fit
from compress.share.similarity import Similarity

TAKEN: Mapping[str, str] = {"attn": "attention", "kv": "keys and values"}


def layers_told(shares: dict[int, Share], fits: dict[int, Fit], similarity: Similarity | None) -> list[dict[str, Any]]:
    """Of every layer that shares, from which one and how well it was fitted."""
    found = []
    for layer, share in sorted(shares.items()):
        fit = fits.get(layer)
        errors = (None, None) if fit is None else (fit.before, fit.after)
        heads = None if share.head_map is None else list(share.head_map)
        entry = {
            "layer": layer,
            "mode": share.mode,
            "source": share.source,
            "head_map": heads,
            **dict(zip(("error_before", "error_after"), errors, strict=True)),
        }
        if fit is not None and fit.scores is not None:
            entry |= {"score_rank": share.rank, "score_error_before": fit.scores[1], "score_error_after": fit.scores[2]}
        if similarity is not None:
            entry["cosine"] = float(similarity.cosines()[layer, share.source])
        found.append(entry)
    return found


def found_told(
    view: ModelView, settings: Sharing, state: dict[str, Any], shares: dict[int, Share], similarity: Similarity | None
) -> dict[str, Any]:
    """What is told whether layers share or not."""
    losses = state.get("losses", {})
    dense = losses.get("dense", state.get("search", {}).get("dense"))
    found: dict[str, Any] = {
        "method": settings.method,
        "mode": MODES[settings.method],
        "way": "named" if settings.pairs else way(settings),
        "refit": settings.refit,
        "held_out": {
            "windows": settings.check_windows,
            "perplexity": {name: round(math.exp(loss), 4) for name, loss in losses.items()},
        },
        "budget": settings.budget if settings.choose == "search" and settings.method == "echoatt" else None,
        "search": state.get("search"),
        "tried": state.get("tried"),
        "distances": state.get("distances"),
        "similarity": None if similarity is None else _rounded(similarity.cosines()),
        **_savings(view, shares),
    }
    if dense is not None:
        found["held_out"]["perplexity"].setdefault("dense", round(math.exp(dense), 4))
    return found | {"summary": _summary(view, found, shares, state)}


def _savings(view: ModelView, shares: dict[int, Share]) -> dict[str, Any]:
    """Parameters that are gone, and the share of the KV cache of 16 bits that is."""
    facts = view.facts
    gone = 0
    for layer, share in shares.items():
        dense = facts.shapes(layer)
        gone += sum(map(math.prod, dense.values())) - sum(map(math.prod, kept(dense, view.family, share).values()))
    halves = sum(1 - share.rank / facts.head_dim if share.mode == "attn" else 2 for share in shares.values())
    return {
        "dropped_parameters": gone,
        "dropped_share": round(gone / facts.num_params, 5),
        "cache_share": round(halves / (2 * facts.num_layers), 5),
    }


def _summary(view: ModelView, found: dict[str, Any], shares: dict[int, Share], state: dict[str, Any]) -> str:
    perplexities = found["held_out"]["perplexity"]
    if not shares:
        return _nothing(found)
    last = perplexities.get("trained", perplexities["fitted"])
    grown = last / perplexities["dense"] - 1
    copied = perplexities["copied"] / perplexities["dense"] - 1
    made_up = "" if found["refit"] == "none" and "trained" not in perplexities else f" ({copied:+.2%} by copying alone)"
    saved = f"{found['dropped_share']:.1%} of the parameters and {found['cache_share']:.1%} of the KV cache less"
    if (decode := state.get("decode")) is not None:
        saved += f", a token in {decode['shared_ms']:.1f} ms instead of {decode['dense_ms']:.1f}"
    taking = f"{len(shares)} of {view.num_layers} layers take {TAKEN[found['mode']]} of an earlier one"
    return f"{taking}: {saved}, perplexity {grown:+.2%} on held-out text{made_up}"


def _nothing(found: dict[str, Any]) -> str:
    search = found["search"]
    if search is not None and search["measured"]:
        least = min(search["measured"], key=lambda one: one["nll"])
        grown = math.expm1(least["nll"] - search["dense"])
        return (
            f"no layer shares: none fits the budget of {found['budget']:.1%} perplexity, the cheapest (layer"
            f" {least['layer']} with {least['source']}) costs {grown:+.2%}; the model stays as it is"
        )
    if found["tried"]:
        return "no layer shares: no pair keeps the last hidden states above share.threshold; the model stays as it is"
    return "no layer shares: none is left that may; the model stays as it is"


def way(settings: Sharing) -> str:
    """How layers are chosen, in words."""
    if settings.method == "kvsharer":
        return f"{settings.order} ones first"
    if settings.choose == "blocks":
        return f"in runs of {settings.block}"
    budget = "no budget" if settings.budget is None else f"a budget of {settings.budget:.1%} perplexity"
    return f"searched under {budget}"


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]
