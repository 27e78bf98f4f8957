"""KV heads that copy from far back, whose tokens are all salient.

Saliency is what the rows of a prompt look at, and a number that nobody has asked for yet isn't looked at. The few heads
that will fetch it, induction heads, can be told beforehand: by what they attend to on random tokens that are repeated
(``compress.heads.copies``). Their tokens are kept at the salient tokens' bits.
"""

import math

import torch
from torch import Tensor

from compress.artifact.packed_checkpoint import stored_view
from compress.fingerprint import sliding_layers
from compress.heads.copies import Copies
from compress.heads.rows import by_kv_head
from compress.job import Job
from compress.model import ModelView
from compress.tap import NAME, Seen

LENGTH = 1024  # tokens of all copies together
COPIES = 4

Place = tuple[int, int]
"""A layer and one of its KV heads."""


def how_many(share: float, heads: int) -> int:
    """KV heads that a share of them is, rounded up."""
    return math.ceil(round(share * heads, 6))


@torch.no_grad()
def copying_scores(view: ModelView, device: torch.device, seed: int = 0) -> Tensor:
    """How much every KV head copies, with one layer of the model in memory.

    Args:
        view: the model, quantized already where it will be.
        device: where layers run.
        seed: of the tokens.

    Returns:
        [layers, KV heads] float32, mean mass of the best query head, 0 to 1; 0 in layers with a sliding window.
    """
    config, embed = view.config, view.embed_weight()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    copies = Copies.of(view.tokenizer(), len(embed), length, COPIES, seed)
    hidden = embed[copies.ids][None].to(device)
    del embed
    tokens = len(copies.ids)
    cos, sin = view.position_embeddings(tokens)
    found = torch.zeros(view.num_layers, config.num_attention_heads)
    sliding = sliding_layers(config)

    def look(seen: Seen) -> Tensor:
        if seen.layer not in sliding:
            found[seen.layer] = copies.mass(seen, ahead=1).cpu()
        return seen.attend()

    for index in range(view.num_layers):
        layer = view.build_layer(index, view.layer_weights(index)).to(device)
        layer.get_submodule(view.family.attention).config._attn_implementation = NAME  # type: ignore[union-attr]
        mask = view.attention_mask(index, tokens)
        hidden = layer(
            hidden,
            attention_mask=None if mask is None else mask.to(device),
            position_embeddings=(cos.to(device), sin.to(device)),
            tap=look,
        )
    return by_kv_head(found, view.facts.config.num_key_value_heads)


def copying_heads(job: Job, stage: str, places: list[Place], share: float) -> list[Place]:
    """Those of some KV heads that copy most; what an earlier attempt at a run has found is kept.

    Args:
        job: the run.
        stage: whose state keeps them.
        places: the heads among which to choose.
        share: of these, rounded up.
    """
    state, count = job.folder.stage(stage), how_many(share, len(places))
    if not count:
        return []
    if "copying" not in state:
        view = job.view if job.result is None else stored_view(job.view, job.result)
        scores = copying_scores(view, job.device, job.report["seed"])
        others = torch.ones_like(scores, dtype=torch.bool)
        for place in places:
            others[place] = False
        found = best(scores.masked_fill(others, -1.0), count, sorted({layer for layer, _ in places}))
        state["copying"] = [list(place) for place in found]
        job.folder.save()
    return [(layer, head) for layer, head in state["copying"]]


def best(scores: Tensor, count: int, layers: list[int]) -> list[Place]:
    """The KV heads that copy most, of some layers; the earlier one where two are alike."""
    places = [(layer, head) for layer in layers for head in range(scores.shape[1])]
    return sorted(sorted(places, key=lambda place: -float(scores[place]))[:count])


def anywhere(count: int, heads: int, layers: list[int]) -> list[Place]:
    """As many KV heads, spread over some layers, for bytes that don't depend on which they are."""
    places = [(layer, head) for head in range(heads) for layer in layers]
    return sorted(places[:count])
