"""How many heads rest on the first token (Gu et al., arXiv 2410.10781, section 3.2): a model's health in one figure."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.evalsuite.head import evaluating
from compress.heads.layers import Layers
from compress.kernels.attention_mass import attention_mass
from compress.tap import Seen

TOKENS = 64
"""Length of the sequences that the published figures are of."""

THRESHOLD = 0.3
SEQUENCES = 16  # of every head, so that some hundred heads are measured thousands of times


@dataclass(frozen=True)
class SinkChange:
    """The sink rate of two models on the same text.

    Attributes:
        before: percent, of the original.
        after: of the compressed model.
        sequences: pieces of text.
        tokens: of each of them.
        threshold: of the mean attention to the first token.
    """

    before: float
    after: float
    sequences: int
    tokens: int = TOKENS
    threshold: float = THRESHOLD

    def to_json(self) -> dict[str, float]:
        """As JSON types."""
        return asdict(self)


def sink_windows(ids: Tensor) -> Tensor:
    """Pieces from all over a text ``[N]`` for :func:`sink_rate`, ``[n, TOKENS]``, none where it is too short."""
    count = min(SEQUENCES, len(ids) // TOKENS)
    step = len(ids) // max(count, 1)
    return torch.stack([ids[i * step : i * step + TOKENS] for i in range(count)]) if count else ids.new_empty(0, TOKENS)


def sink_rate(model: PreTrainedModel, batches: Iterable[Tensor], threshold: float = THRESHOLD) -> float:
    """The share of query heads whose mean attention to the first token is above a threshold.

    With A_i1 the attention of row i to the first token, it is the mean over sequences, layers and heads of
    ``[mean over i of A_i1 > threshold]``. A fall by more than 5 points after
    compression foretells a collapse.

    Args:
        model: a causal language model; it is left as it was.
        batches: token ids ``[B, T]`` without padding; 100 sequences of 64 tokens are the published setting.
        threshold: between 0 and 1.

    Returns:
        Percent, 0 to 100.
    """
    layers = Layers(model)
    resting, seen_heads = 0, 0

    def tap(seen: Seen) -> Tensor:
        nonlocal resting, seen_heads
        window = layers.config.sliding_window if seen.layer in layers.sliding else None
        mass = attention_mass(seen.query, seen.key, None, seen.scaling, window)[..., 0] / seen.key.shape[2]
        resting += int((mass > threshold).sum())
        seen_heads += mass.numel()
        return seen.attend()

    with evaluating(model), layers.tapped(), torch.inference_mode():
        for ids in batches:
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1, tap=tap)
    return 100 * resting / seen_heads
