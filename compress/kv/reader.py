"""Attention of the newest tokens over all that is held, with the list of segments kept from token to token."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compress.kernels.segment_attention import Segment, prepared

Prepared = Callable[[Tensor, float], tuple[Tensor, Tensor]]


class Reader:
    """Reads segments; told when their tensors were exchanged, it looks at them anew.

    Between two such calls only their bounds change, which are read from their tensors for every token.
    """

    def __init__(self) -> None:
        self._prepared: Prepared | None = None

    def forget(self) -> None:
        """Tensors were exchanged."""
        self._prepared = None

    def read(self, query: Tensor, segments: Callable[[], list[Segment]], scaling: float) -> tuple[Tensor, Tensor]:
        """Output [batch, heads, rows, head_dim] and log-sum-exp [batch, heads, rows]; every row sees everything."""
        if self._prepared is None:
            self._prepared = prepared(segments())
        return self._prepared(query, scaling)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy looks at its own tensors: addresses of these mean nothing to it."""
        return Reader, ()
