"""One layer of a cache that an attention plan describes, as transformers sees it.

``update`` can only take keys and values in, because it isn't shown the queries; so it returns a handle, and the
attention function (``compress.kv.attention``) asks the layer behind it to attend. The layer deals with what
transformers sends: columns and padding, further chunks, crops, beams. Keys and values themselves are in its parts, one
for each group of KV heads that are kept alike (``part.py``). Where no head is packed they stay together, and the
model's own attention is used, until the text is so long that a head drops a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from compress.evalsuite.efficiency import allocated
from compress.kernels.ragged_decode import ragged_decode
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.growing import GrowingLayer
from compress.kv.part import Call, Part
from compress.kv.plain import PlainPart
from compress.kv.window import Tokens

NO_GRADIENTS = "a packed KV cache has no gradients; call the model under torch.no_grad()"


class Handle:
    """What stands in the place of keys and values between ``update`` and the attention function."""

    def __init__(self, layer: "PlanLayer") -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this cache's keys and values have no {name!r}: another attention function than 'compress_plan' was "
            "called; select it with model.set_attn_implementation('compress_plan'), or make the cache with "
            "PlanCache(..., materialize=True)"
        )


@dataclass(frozen=True)
class Cluster:
    """KV heads of a layer that are kept alike.

    Attributes:
        heads: their numbers, ascending; None for all.
        part: keeps them.
    """

    heads: tuple[int, ...] | None
    part: Part

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """The first head and how many there are, where they lie side by side."""
        assert self.heads is not None
        first, count = self.heads[0], len(self.heads)
        return (first, count) if self.heads == tuple(range(first, first + count)) else None


class PlanLayer(CacheLayerMixin):
    """The cache of one layer; see the module's text.

    Args:
        index: of the layer, for messages.
        clusters: every KV head is in one of them.
    """

    is_sliding = False

    def __init__(self, index: int, clusters: Sequence[Cluster]) -> None:
        super().__init__()
        self.index, self.clusters = index, tuple(clusters)
        self._staged: tuple[Tensor, Tensor] | None = None
        self._columns = 0  # tokens and padding that were taken in
        self._valid: Tensor | None = None  # [batch, columns] bool, once there was padding
        plain = all(isinstance(cluster.part, PlainPart) for cluster in self.clusters)
        self._whole = GrowingLayer() if plain else None  # what is held, until a head drops something
        self._inference = False  # whether some tensors are inference mode's, which nobody else may write to

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be forgotten as things are."""
        return self._whole is not None or all(cluster.part.croppable for cluster in self.clusters)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type, device and shape from the first keys [batch, KV heads, tokens, head_dim].

        Raises:
            ValueError: values of another shape than the keys, or a head size that can't be packed.
        """
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.index}: keys {list(key_states.shape)} and values {list(value_states.shape)} must have "
                "the same shape"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._batch = len(key_states)
        if self._whole is None:
            self._begin(key_states)
        self.is_initialized = True

    def _begin(self, key_states: Tensor) -> None:
        """Let the parts take type, device and shape; not before they are needed, which short texts never do."""
        for cluster in self.clusters:
            cluster.part.begin(_of(cluster, key_states, key_states.shape[1]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take in [batch, KV heads, new, head_dim]; returns a handle twice, or all that is held while it is whole."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._whole is not None and not self._drops(self._columns + key_states.shape[2]):
            self._columns += key_states.shape[2]
            return self._whole.update(key_states, value_states)
        self._staged = key_states, value_states
        handle = Handle(self)
        return handle, handle

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of the staged tokens' queries over everything that is held, and the staged tokens; then keep them.

        Args:
            query: [batch, heads, new, head_dim].
            mask: [batch, columns] bool, False for padding; None where there is none.
            scaling: factor of the scores.

        Returns:
            [batch, heads, new, head_dim]; zeros where the query itself is padding.

        Raises:
            ValueError: a mask that treats earlier tokens otherwise than when they came; keys or values that aren't
                finite, found when they are packed.
        """
        key, value = self._taken()
        count = query.shape[2]
        self._part_with(mask)
        valid = self._shown(mask, count)
        alone = self._columns == 0
        self._note_columns(count, valid)
        if count == 1 and valid is None and not alone:
            return self._step(query, key, value, scaling)
        order = None if valid is None else valid.to(torch.int8).argsort(dim=1, stable=True)  # padding to the left
        if order is not None:
            query, key, value = (_ordered(states, order) for states in (query, key, value))
        call = Call(scaling, self._padding(valid), alone)
        out = self._each(query, key, value, lambda part, q, new: part.chunk(q, new, call))
        if order is None or valid is None:
            return out
        out = torch.empty_like(out).scatter_(2, _wide(order, out), out)
        return out.masked_fill_(~valid[:, None, :, None], 0.0)

    def keep(self, mass: Tensor | None = None) -> None:
        """Keep the staged tokens without attending, to count bytes.

        Args:
            mass: attention that they are said to have received, [batch, KV heads, new] float32, where it matters.
        """
        if self._staged is None:
            return  # the layer is still whole, and has kept them
        key, value = self._taken()
        self._part_with(None)
        call = Call(1.0, self._padding(None), self._columns == 0)
        self._note_columns(key.shape[2], None)
        for cluster in self.clusters:
            new = Tokens(*(_of(cluster, states, key.shape[1]) for states in (key, value)))
            if mass is not None:
                new.add_scores(_of(cluster, mass, key.shape[1]), torch.ones(len(key), len(new), device=key.device))
            cluster.part.keep(new, call)

    def get_seq_length(self) -> int:
        """Columns, padding among them; positions and masks depend on it."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns that the next queries may see."""
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        """No largest length."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, ``-tokens_to_remove`` of them; what is kept of the others stays as it is.

        Raises:
            ValueError: a positive number, more than there are, or tokens of heads that dropped what they would see
                then.
        """
        count = -tokens_to_remove
        if count < 0 or count > self._columns:
            allowed = f"0 to -{self._columns}"
            raise ValueError(f"crop({tokens_to_remove}) of a cache with {self._columns} columns; allowed: {allowed}")
        if count == 0:
            return
        if not self.is_croppable:
            raise ValueError(
                f"crop({tokens_to_remove}): heads of layer {self.index} that see a window have dropped the tokens "
                "before it; allowed: 0"
            )
        self._thaw()
        removed = torch.full((self._batch,), count)
        if self._valid is not None:
            removed = self._valid[:, -count:].sum(1).cpu()
            self._valid = self._valid[:, :-count]
        self._columns -= count
        if self._whole is not None:
            self._whole.crop(tokens_to_remove)
            return
        for cluster in self.clusters:
            cluster.part.crop(removed)

    def reset(self) -> None:
        """Forget everything."""
        fresh = [Cluster(cluster.heads, cluster.part.fresh()) for cluster in self.clusters]
        self.__init__(self.index, fresh)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, as beam search does."""
        self._change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: "Tensor | Sequence[int]") -> None:
        """Keep some of the sequences."""
        self._change_batch(lambda held: held[torch.as_tensor(indices, device=held.device)])

    def offload(self) -> None:
        """Not done: such a layer is small, and would be moved for every token."""

    def prefetch(self) -> None:
        """As ``offload``."""

    def nbytes(self) -> KVBytes:
        """Bytes of keys and values, of all that is kept for the tokens, and of all tensors with their spare room."""
        if not self.is_initialized:
            return KVBytes(0, 0, 0)
        if self._whole is not None:
            return plain_bytes(self._whole)
        total = sum((cluster.part.nbytes() for cluster in self.clusters), KVBytes(0, 0, 0))
        return total + KVBytes(0, 0, allocated(self._valid).nbytes)

    def _taken(self) -> tuple[Tensor, Tensor]:
        if self._staged is None:
            raise RuntimeError(f"layer {self.index}: attention was called without new keys and values")
        staged, self._staged = self._staged, None
        self._thaw()
        if self._whole is not None:
            self._begin(staged[0])
        return staged

    def _drops(self, length: int) -> bool:
        """Whether a head doesn't see all of so many tokens."""
        return any(isinstance(cluster.part, PlainPart) and cluster.part.drops(length) for cluster in self.clusters)

    def _part_with(self, mask: Tensor | None) -> None:
        """Give what was whole to the parts."""
        whole, self._whole = self._whole, None
        if whole is None or not self._columns:
            return
        valid = None if mask is None else mask[:, : self._columns].bool()
        if valid is not None and not bool(valid.all()):
            self._valid = valid
            order = valid.to(torch.int8).argsort(dim=1, stable=True)
            whole.keys, whole.values = (_ordered(states, order) for states in (whole.keys, whole.values))
        call = Call(1.0, self._padding(self._valid), alone=True)
        for cluster in self.clusters:
            new = Tokens(*(_of(cluster, states, whole.keys.shape[1]) for states in (whole.keys, whole.values)))
            cluster.part.keep(new, call)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token of every sequence; heads without packed or far tokens attend together."""
        held: list[tuple[Cluster, PlainPart, tuple[int, ...]]] = []
        for cluster in self.clusters:
            if not isinstance(cluster.part, PlainPart) or not cluster.part.joins:
                return self._each(query, key, value, lambda part, q, new: part.step(q, new, scaling))
            heads = tuple(range(key.shape[1])) if cluster.heads is None else cluster.heads
            held.append((cluster, cluster.part, heads))
        for cluster, part, _ in held:
            part.append(Tokens(*(_of(cluster, states, key.shape[1]) for states in (key, value))))
        return ragged_decode(query, [part.cluster(heads) for _, part, heads in held], scaling)[0]

    def _each(self, query: Tensor, key: Tensor, value: Tensor, attend: Any) -> Tensor:
        """The output of every cluster, in its heads' places."""
        if len(self.clusters) == 1:
            out: Tensor = attend(self.clusters[0].part, query, Tokens(key, value))
            return out
        group = query.shape[1] // key.shape[1]
        whole: Tensor | None = None
        for cluster in self.clusters:
            new = Tokens(*(_of(cluster, states, key.shape[1]) for states in (key, value)))
            found = attend(cluster.part, _of(cluster, query, key.shape[1]), new)
            whole = found.new_empty(query.shape) if whole is None else whole
            _put(cluster, whole, found, group)
        assert whole is not None
        return whole

    def _shown(self, mask: Tensor | None, count: int) -> Tensor | None:
        """Which of the new columns are tokens, [batch, count] bool; None for all of them."""
        if mask is None:
            same, new = self._valid is None or bool(self._valid.all()), None
        else:
            if mask.shape[1] != self._columns + count:
                raise ValueError(
                    f"layer {self.index}: the attention mask has {mask.shape[1]} columns, the cache and the new tokens "
                    f"{self._columns + count}"
                )
            before, new = mask[:, :-count].bool(), mask[:, -count:].bool()
            same = bool(before.all()) if self._valid is None else torch.equal(before, self._valid)
        if not same:
            raise ValueError(
                f"layer {self.index}: the attention mask hides or shows earlier tokens otherwise than when they came, "
                "and what was packed or dropped can't be changed; reset the cache and send the tokens again"
            )
        return None if new is None or bool(new.all()) else new

    def _padding(self, valid: Tensor | None) -> Tensor:
        """Columns of padding of every sequence, [batch] int64 on the CPU."""
        return torch.zeros(self._batch, dtype=torch.int64) if valid is None else (~valid).sum(1).cpu()

    def _note_columns(self, count: int, valid: Tensor | None) -> None:
        if valid is not None or self._valid is not None:
            before = self._valid
            if before is None:
                before = torch.ones(self._batch, self._columns, dtype=torch.bool, device=self.device)
            now = torch.ones(self._batch, count, dtype=torch.bool, device=self.device) if valid is None else valid
            self._valid = torch.cat([before, now], 1)
        self._columns += count

    def _change_batch(self, change: Change) -> None:
        if not self.is_initialized:
            return
        if self._whole is None:
            for cluster in self.clusters:
                cluster.part.change(change)
        elif self._columns:
            self._whole.rearrange(change)
        if self._valid is not None:
            self._valid = change(self._valid)
        self._batch = len(change(torch.empty(self._batch)))

    def _thaw(self) -> None:
        """Tensors that were made in inference mode are copied, where they have to be written to outside of it."""
        if torch.is_inference_mode_enabled():
            self._inference = True
        elif self._inference:
            self._inference = False
            self._change_batch(torch.clone)


def plain_bytes(layer: DynamicLayer) -> KVBytes:
    """Bytes of a layer whose keys and values are tensors: all of them are payload, and some have spare room."""
    if not isinstance(layer.values, Tensor) or layer.values.numel() == 0:
        return KVBytes(0, 0, 0)
    held = layer.keys.nbytes + layer.values.nbytes
    rooms = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
    return KVBytes(held, held, sum(rooms.values()))


def _of(cluster: Cluster, states: Tensor, kv_heads: int) -> Tensor:
    """The cluster's heads of [batch, heads, ...], of query heads too; a view where they lie side by side."""
    if cluster.heads is None:
        return states
    group = states.shape[1] // kv_heads
    if cluster.run is not None:
        first, count = cluster.run
        return states.narrow(1, first * group, count * group)
    grouped = states.unflatten(1, (kv_heads, group))
    return grouped[:, list(cluster.heads)].flatten(1, 2)


def _put(cluster: Cluster, whole: Tensor, found: Tensor, group: int) -> None:
    """Write the output of a cluster, [batch, its query heads, ...], into its heads' places."""
    assert cluster.heads is not None
    if cluster.run is not None:  # a slice is copied, where numbers would be looked up
        whole.narrow(1, cluster.run[0] * group, cluster.run[1] * group).copy_(found)
        return
    grouped = whole.unflatten(1, (-1, group))
    grouped[:, list(cluster.heads)] = found.unflatten(1, (-1, group))


def _ordered(states: Tensor, order: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim], every sequence in an order of its own, ``order`` [batch, tokens]."""
    return states.gather(2, _wide(order, states))


def _wide(order: Tensor, states: Tensor) -> Tensor:
    return order[:, None, :, None].expand(states.shape)
