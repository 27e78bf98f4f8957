"""An attention function that shows queries, keys and values to whoever asks, and lets them give the answer.

A call of a model or layer whose attention is ``compress_tap`` takes ``tap=f``; transformers hands it through to here.
Queries and keys are seen after their norms and rotary embedding, whatever a family does to them. Without ``tap`` it is
transformers' SDPA attention. What other layers take from a layer is held for them (``compress/share/echo.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.share.echo import ECHO, Echo

NAME = "compress_tap"


@dataclass(frozen=True)
class Seen:
    """One call of attention.

    Attributes:
        layer: number of the layer.
        query: [batch, heads, T, head_dim].
        key: [batch, KV heads, T, head_dim].
        value: alike.
        scaling: factor of the scores.
        attend: the model's own attention, [batch, T, heads, head_dim].
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    attend: Callable[[], Tensor]

    def of(self, heads: Sequence[int]) -> "Seen":
        """The same for some KV heads, with the query heads of their groups."""
        chosen, group = list(heads), self.query.shape[1] // self.key.shape[1]

        def attend() -> Tensor:
            return self.attend().unflatten(2, (-1, group))[:, :, chosen].flatten(2, 3)

        query = self.query.unflatten(1, (-1, group))[:, chosen].flatten(1, 2)
        return replace(self, query=query, key=self.key[:, chosen], value=self.value[:, chosen], attend=attend)


Tap = Callable[[Seen], Tensor]
"""Gives what attention gives, [batch, T, heads, head_dim]."""


def tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """See the module's text; shapes as in :class:`Seen`."""
    tap = kwargs.pop("tap", None)
    echo: Echo | None = getattr(module, ECHO, None)
    if echo is not None:
        echo.lead(module.layer_idx, query, key, value, attention_mask, kwargs["scaling"])  # type: ignore[arg-type]

    def attend() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]

    if tap is None:
        return attend(), None
    scaling = kwargs["scaling"]
    return tap(Seen(module.layer_idx, query, key, value, scaling, attend)), None  # type: ignore[operator,arg-type]


AttentionInterface.register(NAME, tapped_attention)
