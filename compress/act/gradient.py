"""How the loss of an answer changes with beta, for every KV head at once, in one forward and one backward pass.

At ``beta = 1`` the model is what it is, and the derivative of the loss L by a head's beta is

    dL / dbeta = sum over the group's query heads and rows i of <dO_i, m_i (Os_i - Ot_i)>

with dO the gradient of L by the output of attention, Os and Ot the outputs over sinks and over all other tokens, and m
the sinks' share. The paper evaluates the model once for every head instead (arXiv 2406.15765, section 4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.act.questions import Question
from compress.act.segments import calibrated, split
from compress.act.sinks import received, sight, sinks
from compress.heads.data import Item
from compress.heads.influence import answer_loss, attention_gradients
from compress.heads.layers import Layers
from compress.plan import Calibration
from compress.tap import Seen, Tap


@dataclass(frozen=True)
class Slopes:
    """What a question says.

    Attributes:
        by_beta: derivative of the loss by every KV head's beta, [layers, KV heads] float64; 0 in layers with a sliding
            window of the model's own, and where a head has no sinks.
        sinks: mean number of a query head's sinks, [layers] float64.
    """

    by_beta: Tensor
    sinks: Tensor


def slopes(layers: Layers, question: Question, how: Calibration, choice: bool = False) -> Slopes:
    """The derivatives by beta at ``beta = 1``; sinks are found in the whole text of a question and its answer.

    Args:
        layers: of the model, within :meth:`Layers.tapped`.
        question: with a right answer.
        how: says what a sink is.
        choice: the loss is ``-log softmax`` of the answers' log-likelihoods at the right one, instead of the mean
            cross-entropy of the right answer's tokens.
    """
    if not choice:
        return Slopes(*_slopes(layers, question.right, how))
    shares = _scores(layers, question, None).softmax(0)
    total, counted = torch.zeros(layers.count, layers.kv_heads, dtype=torch.float64), []
    for number, item in enumerate(question.answers):
        found, counts = _slopes(layers, item, how)
        total += (float(number == question.gold) - shares[number]) * _tokens(item) * found
        counted.append(counts)
    return Slopes(total, torch.stack(counted).mean(0))


def question_loss(
    layers: Layers, question: Question, tap: Tap | None = None, choice: bool = False
) -> tuple[float, bool | None]:
    """The loss whose derivatives :func:`slopes` gives, attention replaced by a tap.

    Args:
        layers: of the model, within :meth:`Layers.tapped`.
        question: with a right answer.
        tap: of the layers of full attention; None for the model's own.
        choice: as there.

    Returns:
        In nats; with ``choice``, whether the right answer is the likeliest.
    """
    if not choice:
        return answer_loss(layers, question.right, tap), None
    scores = _scores(layers, question, tap)
    return float(-scores.log_softmax(0)[question.gold]), int(scores.argmax()) == question.gold


def calibrating(heads: Mapping[int, Sequence[int]], how: Calibration) -> Tap:
    """A tap that calibrates KV heads, by layer, on whole texts."""

    def tap(seen: Seen) -> Tensor:
        out = seen.attend()
        own = heads.get(seen.layer)
        if not own:
            return out
        chosen = torch.tensor(own, device=out.device)
        key, value = (x.index_select(1, chosen) for x in (seen.key, seen.value))
        group = seen.query.shape[1] // seen.key.shape[1]
        places = (chosen[:, None] * group + torch.arange(group, device=out.device)).flatten()
        query = seen.query.index_select(1, places)
        changed = calibrated(query, key, value, _found(query, key, seen.scaling, how), (how.beta, seen.scaling))
        return out.index_copy(2, places, changed.transpose(1, 2).to(out.dtype))

    return tap


def _scores(layers: Layers, question: Question, tap: Tap | None) -> Tensor:
    """Log-likelihoods of all answers, float64."""
    found = [-answer_loss(layers, item, tap) * _tokens(item) for item in question.answers]
    return torch.tensor(found, dtype=torch.float64)


def _slopes(layers: Layers, item: Item, how: Calibration) -> tuple[Tensor, Tensor]:
    """Derivatives of the mean cross-entropy of an answer's tokens, [layers, KV heads], and sinks a query head."""
    found = torch.zeros(layers.count, layers.kv_heads, dtype=torch.float64)
    counts = torch.zeros(layers.count, dtype=torch.float64)
    for seen, gradient in attention_gradients(layers, item):
        query, key, value = (x.detach() for x in (seen.query, seen.key, seen.value))
        marked = _found(query, key, seen.scaling, how)
        counts[seen.layer] = float(marked.sum()) / query.shape[1]
        if counts[seen.layer]:
            change = split(query, key, value, marked, seen.scaling).slope()
            by_head = (gradient.transpose(1, 2).float() * change).sum((0, 2, 3))
            found[seen.layer] = by_head.unflatten(0, (layers.kv_heads, -1)).sum(1).double().cpu()
    return found, counts


def _found(query: Tensor, key: Tensor, scaling: float, how: Calibration) -> Tensor:
    """Sinks of whole texts."""
    sums = received(query, key, scaling)
    return sinks(sums, sight(query.shape[2], key.shape[2], sums.device), how)


def _tokens(item: Item) -> int:
    return int(item.supervised.sum())
