"""KVSharer (arXiv 2410.18517): layers take keys and values of an earlier layer, those that differ most tried first.

Keys and values of every layer are averaged over a few short sequences, and all pairs of layers are ordered by their
Euclidean distance. One after the other, the later layer of a pair takes from the earlier one, and keeps doing so if the
last hidden states, averaged alike, still point where the dense model's do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from compress.plan import Share
from compress.share.pairs import Candidates
from compress.share.trial import Course, Trial
from compress.tap import Seen

SEQUENCES = 30
TOKENS = 64


@dataclass(frozen=True)
class Tried:
    """One pair.

    Attributes:
        layer: that takes.
        source: that gives.
        distance: between their mean keys and values.
        cosine: between mean last hidden states with this pair, those before it and without any.
        added: it stays.
    """

    layer: int
    source: int
    distance: float
    cosine: float
    added: bool


def sequences(ids: Tensor) -> Tensor:
    """Short sequences [n, :data:`TOKENS`] of windows [N, T], spread over them."""
    tokens = min(TOKENS, ids.shape[1])
    cut = ids[:, : ids.shape[1] // tokens * tokens].reshape(-1, tokens)
    return cut[:: max(1, len(cut) // SEQUENCES)][:SEQUENCES]


def distances(trial: Trial, ids: Tensor) -> Tensor:
    """Euclidean distances between the layers' mean keys and values, [L, L].

    Args:
        trial: within ``at_work``, nothing shared.
        ids: sequences [n, T].
    """
    total: dict[int, Tensor] = {}

    def tap(seen: Seen) -> Tensor:
        found = torch.cat([seen.key.float().flatten(), seen.value.float().flatten()]).cpu()
        total[seen.layer] = total[seen.layer] + found if seen.layer in total else found
        return seen.attend()

    for sequence in ids:
        hidden = trial.view.embed(sequence)
        positions = trial.view.positions(hidden)
        for index in range(trial.view.count):
            hidden = trial.view.run(index, hidden, positions, tap)
    means = torch.stack([total[layer] / len(ids) for layer in range(trial.view.count)])
    return torch.cdist(means[None], means[None])[0]


def choose(
    trial: Trial,
    course: Course,
    found: Candidates,
    order: tuple[Tensor, bool],
    threshold: float,
    tell: Callable[[Tried], None],
) -> tuple[dict[int, int], list[Tried]]:
    """The published greedy choice.

    Args:
        trial: within ``at_work``, nothing shared; nothing is at the end.
        course: of the sequences, with a stop at every layer.
        found: layers that may take part.
        order: distances [L, L], and whether the largest come first.
        threshold: least cosine.
        tell: told of every pair that was tried.

    Returns:
        The source by layer that takes, and all pairs that were tried.
    """
    apart, dissimilar = order
    pairs = list(combinations(found.layers, 2))
    pairs.sort(key=lambda pair: float(apart[pair]), reverse=dissimilar)
    dense = _last(trial, course, 0)
    shares: dict[int, Share] = {}
    tried: list[Tried] = []
    for source, layer in pairs:
        if len(shares) >= found.limit:
            break
        if layer not in found.consumers or source not in found.sources(layer, shares):
            continue
        trial.share(attempt := {**shares, layer: Share("kv", source)})
        cosine = float(torch.nn.functional.cosine_similarity(dense, _last(trial, course, layer), dim=0))
        tried.append(Tried(layer, source, float(apart[source, layer]), cosine, cosine > threshold))
        tell(tried[-1])
        if tried[-1].added:
            shares = attempt
            course.changed(layer)
        else:
            trial.share(shares)
    trial.share({})
    return {layer: share.source for layer, share in shares.items()}, tried


def _last(trial: Trial, course: Course, changed: int) -> Tensor:
    """Hidden states behind the last norm, averaged over the sequences, flat."""
    total = sum(trial.view.norm(course.final(index, changed)) for index in range(len(course.ids)))
    trial.forget()
    assert isinstance(total, Tensor)
    return (total / len(course.ids)).flatten()
