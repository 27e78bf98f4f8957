"""Attention of the newest tokens over all that a layer holds, with the list of segments kept from token to token."""

from collections.abc import Callable

from torch import Tensor

from compress.kernels.segment_attention import prepared
from compress.kv.store import Store
from compress.kv.window import Window

Prepared = Callable[[Tensor, float], tuple[Tensor, Tensor]]


class Reader:
    """Reads a store and a window; told when their tensors were exchanged, it looks at them anew.

    Between two such calls only the window's bounds change, which are read from their tensor for every token.
    """

    def __init__(self) -> None:
        self._prepared: Prepared | None = None

    def forget(self) -> None:
        """Tensors were exchanged."""
        self._prepared = None

    def read(self, query: Tensor, store: Store, window: Window, scaling: float) -> tuple[Tensor, Tensor]:
        """Output [batch, heads, rows, head_dim] and log-sum-exp [batch, heads, rows]; every row sees everything."""
        if self._prepared is None:
            self._prepared = prepared([*store.segments(), window.segment()])
        return self._prepared(query, scaling)
