"""How the loss of an answer changes, at first order, where heads see only what a rule leaves them.

One forward and one backward pass through the frozen model give queries, keys, values and the gradient dO of the loss by
every attention output. Then, for KV head k with its group of query heads and for every rule,

    Z[l, k, r] = sum over rows i of | sum over the group of <dO_i, O_rule,i - O_full,i> |

where the absolute value of rows keeps them from cancelling each other, and query heads that share a cache are one. That
is exact at first order in the outputs, for any set of dropped keys; MoA (arXiv 2406.14909) sums over single keys. Only
the layers' inputs are kept: every layer runs again when its gradient is due, as memory for one layer's suffices.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from compress.evalsuite.head import chunk_tokens, evaluating
from compress.heads.bins import Span, changes, elementwise, placed, row_blocks
from compress.heads.data import Item
from compress.heads.layers import Layers
from compress.plan_writer import Rule
from compress.tap import Seen, Tap

COPIES = 4  # of logits, while their gradient is computed


def influence(model: PreTrainedModel, items: Sequence[Item], rules: Sequence[Rule], published: bool = False) -> Tensor:
    """Z of every KV head and rule, mean over items.

    Args:
        model: a causal language model, left as it was.
        items: prompts; the loss is the mean cross-entropy of the tokens of their answers. The length that a rule's
            window follows is an item's own.
        rules: what heads would see, strides with another phase in every layer (`placed`).
        published: MoA's sum of the influence of single keys, per query head, instead.

    Returns:
        [layers, KV heads, rules] float32 on the CPU, 0 in layers with a sliding window of the model's own.
    """
    layers = Layers(model)
    found = torch.zeros(layers.count, layers.kv_heads, len(rules), dtype=torch.float64)
    measure = elementwise if published else changes
    with evaluating(model), layers.tapped():
        for item in items:
            for seen, gradient in attention_gradients(layers, item):
                spans = [Span.of(placed(rule, seen.layer), len(item.ids)) for rule in rules]
                for rows in row_blocks(seen, gradient, first=min(span.sink + span.window for span in spans)):
                    by_head = measure(rows, spans)
                    grouped = by_head.view(rows.kv_heads.stop - rows.kv_heads.start, -1, *by_head.shape[1:]).sum(1)
                    found[seen.layer, rows.kv_heads] += grouped.abs().sum(1).cpu()
    return (found / len(items)).float()


def attention_gradients(layers: Layers, item: Item) -> Iterator[tuple[Seen, Tensor]]:
    """What every layer of full attention sees, and the gradient of the answer's loss by what it gives.

    Args:
        layers: of the model, within :meth:`Layers.tapped`.
        item: the prompt.

    Yields:
        From the last layer on, what attention saw, and ``[1, T, heads, head_dim]``.
    """
    hidden = layers.embed(item.ids).detach()
    positions = layers.positions(hidden)
    inputs = [hidden]
    for index in range(layers.count):
        inputs.append(layers.run(index, inputs[-1], positions, None).detach())
    upstream = _loss_gradient(layers, inputs.pop(), item)
    count = int(item.supervised.sum())
    for index in range(layers.count - 1, layers.full[0] - 1, -1):
        with torch.enable_grad():
            entered = inputs.pop().requires_grad_()
            shown: list[tuple[Seen, Tensor]] = []

            def see(seen: Seen, shown: list[tuple[Seen, Tensor]] = shown) -> Tensor:
                shown.append((seen, seen.attend()))
                return shown[0][1]

            output = layers.run(index, entered, positions, see if index in layers.full else None)
            upstream, *own = torch.autograd.grad(output, [entered, *(given for _, given in shown)], upstream)
        for (seen, _), gradient in zip(shown, own, strict=True):
            yield seen, gradient / count  # a loss of many tokens, since a mean's gradient may vanish in 16 bits


def answer_loss(layers: Layers, item: Item, tap: Tap | None = None) -> float:
    """Mean cross-entropy of an item's answer tokens, attention replaced by a tap, in nats.

    Args:
        layers: of the model, within :meth:`Layers.tapped`.
        item: the prompt.
        tap: of the layers of full attention; None for the model's own.
    """
    hidden = layers.embed(item.ids)
    positions = layers.positions(hidden)
    for index in range(layers.count):
        hidden = layers.run(index, hidden, positions, tap if index in layers.full else None)
    total = sum(float(_summed(layers, hidden, item, places)) for places in _places(layers, item))
    return total / int(item.supervised.sum())


def _loss_gradient(layers: Layers, last: Tensor, item: Item) -> Tensor:
    """Of the sum over an answer's tokens, by the residual stream behind the last layer."""
    found = torch.zeros_like(last)
    for places in _places(layers, item):
        with torch.enable_grad():
            own = last.detach().requires_grad_()
            found += torch.autograd.grad(_summed(layers, own, item, places), own)[0]
    return found


def _places(layers: Layers, item: Item) -> tuple[Tensor, ...]:
    """The positions that are judged, so many at once as their logits have room."""
    return item.supervised.nonzero()[:, 0].split(chunk_tokens(layers.config.vocab_size, COPIES))


def _summed(layers: Layers, hidden: Tensor, item: Item, places: Tensor) -> Tensor:
    """Cross-entropy of the tokens behind some positions, summed."""
    logits = layers.logits(hidden[0, places.to(hidden.device)])
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, item.ids[places + 1].to(exact.device), reduction="sum")
