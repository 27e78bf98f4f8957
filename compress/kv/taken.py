"""Cache layers of decoder layers that take their attention, or their keys and values, from an earlier one."""

from typing import Any, NoReturn

from torch import Tensor

from compress.kv.growing import GrowingLayer


class ValuesLayer(GrowingLayer):
    """Values only, of a layer that takes its probabilities; its keys have no width, or that of a score residual.

    Args:
        index: of the layer, for messages.
        rank: width of its keys.
    """

    def __init__(self, index: int, rank: int = 0) -> None:
        super().__init__()
        self.index, self.rank = index, rank

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append values [batch, heads, new, head_dim], with keys [batch, heads, new, rank].

        Raises:
            ValueError: there are other keys: the model has this layer's own attention still.
        """
        if key_states.shape[-1] != self.rank:
            raise _unshared(self.index)
        return super().update(key_states, value_states, *args, **kwargs)


class NothingLayer(GrowingLayer):
    """Nothing, of a layer that takes keys and values.

    Args:
        index: of the layer, for messages.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Isn't called.

        Raises:
            ValueError: the model has this layer's own keys and values still.
        """
        raise _unshared(self.index)


def _unshared(index: int) -> ValueError:
    return ValueError(
        f"layer {index} shares attention in the cache's plan and not in the model; load the model with compress.load, "
        "or let it follow the plan (compress.runtime.model.follow)"
    )
