"""Running one decoder layer piece by piece, so that every linear layer's input is seen once.

The layer is transformers' own module; only its order of calls is spelled out here, for the pre-norm block of every
family in the table:

    x = norm(h);  a = attention(x);  h2 = h + o(a);  y = norm(h2);  d = act(gate y) * up y;  h3 = h2 + down(d)

While ``o_proj`` or ``down_proj`` give way to an identity (:meth:`Pieces.without`), and attention goes through a
function of ours that can look at queries and keys after their norms and rotary embedding, whatever the family does to
them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.families import Family
from compress.share.modules import AttentionConsumer, KeyValueConsumer
from compress.tap import NAME, Seen

Observer = Callable[[Tensor, Tensor, float], None]


class Pieces:
    """One decoder layer, callable piece by piece on single sequences ``[T, width]``.

    Args:
        layer: from ``ModelView.build_layer``; its attention is set to ours.
        family: the names of its modules.
        positions: cosines and sines, each ``[1, T, head_dim]``.
        mask: from ``ModelView.attention_mask``.

    Attributes:
        roles: of the linear layers that it has.
    """

    def __init__(self, layer: nn.Module, family: Family, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        self.layer = layer
        self.family = family
        self.positions = positions
        self.mask = mask
        names = dict(layer.named_modules())
        self.roles = tuple(role for role, name in family.roles.items() if name in names)
        self._widths = {role: self.linear(role).in_features for role in self.roles}
        self.attention = layer.get_submodule(family.attention)
        self.attention.config._attn_implementation = NAME  # type: ignore[union-attr]

    def linear(self, role: str) -> nn.Linear:
        """The linear layer of a role: q, k, v, o, gate, up, down."""
        module = self.layer.get_submodule(self.family.roles[role])
        assert isinstance(module, nn.Linear)
        return module

    def width(self, role: str) -> int:
        """Inputs of a linear layer, also while an identity stands in its place."""
        return self._widths[role]

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What q, k and v read."""
        return self._call(self.family.input_norm, hidden)

    def attention_output(self, x: Tensor) -> Tensor:
        """Attention of ``x``; without o, what o reads, ``[T, heads * head_dim]``."""
        return self._attend(x)

    def look(self, x: Tensor, observer: Observer) -> None:
        """Show the queries ``[1, heads, T, head_dim]``, keys ``[1, kv_heads, T, head_dim]`` and scaling."""

        def show(seen: Seen) -> Tensor:
            observer(seen.query, seen.key, seen.scaling)
            return torch.zeros_like(seen.query).transpose(1, 2)  # nothing is attended to

        if isinstance(self.attention, AttentionConsumer | KeyValueConsumer):
            observer(*self.attention.looks(x.unsqueeze(0), self.positions), self.attention.scaling)
            return
        self._attend(x, tap=show)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What gate and up read."""
        return self._call(self.family.post_norm, hidden)

    def mlp_output(self, y: Tensor) -> Tensor:
        """The MLP of ``y``; without down, what down reads, ``[T, intermediate]``."""
        return self._call(self.family.mlp, y)

    def whole(self, hidden: Tensor) -> Tensor:
        """The layer as it stands, ``[T, hidden] -> [T, hidden]``."""
        output: Tensor = self.layer(hidden.unsqueeze(0), attention_mask=self.mask, position_embeddings=self.positions)
        return output.squeeze(0)

    def _attend(self, x: Tensor, **kwargs: object) -> Tensor:
        output: Tensor = self.attention(
            x.unsqueeze(0), position_embeddings=self.positions, attention_mask=self.mask, **kwargs
        )[0]
        return output.squeeze(0)

    def _call(self, module: str, x: Tensor) -> Tensor:
        output: Tensor = self.layer.get_submodule(module)(x.unsqueeze(0))
        return output.squeeze(0)

    @contextmanager
    def without(self, role: str) -> Iterator[None]:
        """Within it an identity stands in the place of a linear layer, so that its input comes out."""
        linear = self.linear(role)
        self.layer.set_submodule(self.family.roles[role], nn.Identity())
        try:
            yield
        finally:
            self.layer.set_submodule(self.family.roles[role], linear)
