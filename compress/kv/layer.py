"""One layer of a packed KV cache, as transformers sees it.

The life of a token (arXiv 2405.14256, with what kv.md of the house adds): it waits in the window; when the window is
full its oldest tokens are scored, the first of all become sinks, the others are packed, salient ones with more bits,
and never touched again. ``update`` can only take keys and values in, because it isn't shown the queries; so it returns
a handle, and the attention function (``compress.runtime.attention``) asks the layer behind it to attend.

Everything is kept in rotated space where ``packing.rotate`` is set: ``q R . k R = q . k`` for an orthogonal R.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compress.evalsuite.efficiency import allocated
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.segment_attention import merge, segment_attention
from compress.kv.bytes import KVBytes
from compress.kv.reader import Reader
from compress.kv.saliency import late_mass, probe_rows, prompt_mass, witnesses
from compress.kv.store import Store
from compress.kv.window import Tokens, Window
from compress.plan import KVBits, Packing

PROBE_EVERY = 8  # steps of decoding between two rows whose attention is looked at


class Handle:
    """What stands in the place of keys and values between ``update`` and the attention function."""

    def __init__(self, layer: "PackedLayer") -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"packed keys and values have no {name!r}: another attention function than 'compress_plan' was called; "
            "select it with model.set_attn_implementation('compress_plan')"
        )


@dataclass(frozen=True)
class LayerFormat:
    """How one layer keeps its tokens.

    Attributes:
        packing: what holds for the whole cache.
        bits: of this layer.
        index: of the layer, which seeds its probes.
        rotation: orthogonal [head_dim, head_dim] float32 shared by all layers, or None.
    """

    packing: Packing
    bits: KVBits
    index: int
    rotation: Tensor | None

    @property
    def scored(self) -> bool:
        """Whether saliency decides anything."""
        return 0 < self.bits.ratio < 1 and self.bits.high != self.bits.low


class PackedLayer(CacheLayerMixin):
    """The cache of one layer; see the module's text.

    Args:
        format: how tokens are kept.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, format: LayerFormat) -> None:
        super().__init__()
        self.format = format
        self._staged: tuple[Tensor, Tensor] | None = None
        self._columns = 0  # tokens and padding that were taken in
        self._valid: Tensor | None = None  # [batch, columns] bool, once there was padding
        self._steps = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type, device and shape from the first keys [batch, KV heads, tokens, head_dim].

        Raises:
            ValueError: a head size that can't be packed, or values of another shape.
        """
        if key_states.shape[-1] % 8 or key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.format.index}: keys {list(key_states.shape)} and values {list(value_states.shape)} can't "
                "be packed; both need the same head_dim, a multiple of 8"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window = Window(self.format.packing.window_bits, key_states, self.format.scored)
        self.store = Store(self.format.packing, self.format.bits, key_states)
        self.reader = Reader()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take in [batch, KV heads, new, head_dim]; returns a handle twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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
            ValueError: keys or values that aren't finite, found when they are packed.
        """
        if self._staged is None:
            raise RuntimeError(f"layer {self.format.index}: attention was called without new keys and values")
        (key, value), self._staged = self._staged, None
        count = query.shape[2]
        valid = None if mask is None or bool(mask[:, -count:].all()) else mask[:, -count:].bool()
        self._note_columns(count, valid)
        if count == 1 and valid is None and self._columns > 1:
            return self._step(query, key, value, scaling)
        return self._chunk(query, Tokens(key, value), valid, scaling)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token of every sequence."""
        query, key = self._rotated(query), self._rotated(key)
        if self.window.append(Tokens(key, value)):
            self.reader.forget()
        out, lse = self.reader.read(query, self.store, self.window, scaling)
        self._steps += 1
        if self.format.scored and self._steps % PROBE_EVERY == 0:
            self._probe(query, lse, scaling)
        self._flush_if_due(Tokens(key[:, :, :0], value[:, :, :0]))
        return out.to(value.dtype)

    def _chunk(self, query: Tensor, new: Tokens, valid: Tensor | None, scaling: float) -> Tensor:
        """A prompt, or a further part of one."""
        order = None if valid is None else valid.to(torch.int8).argsort(dim=1, stable=True)  # padding to the left
        if order is not None:
            query, new = _ordered(query, order), new.gathered(order)
        first = torch.zeros(len(query), dtype=torch.int64) if valid is None else (~valid).sum(1).cpu()
        if self._columns == len(new):
            out = self._prompt(query, new, first, scaling)
            new.keys = self._rotated(new.keys)
        else:
            query, new.keys = self._rotated(query), self._rotated(new.keys)
            out, new, first = self._further(query, new, first, scaling)
        if not len(self.window):
            self.window.begin_at(first)
        self._flush_if_due(new)
        return out if order is None else torch.zeros_like(out).scatter_(2, _wide(order, out), out)

    def _prompt(self, query: Tensor, new: Tokens, first: Tensor, scaling: float) -> Tensor:
        """The first tokens of all attend one another in full precision."""
        if bool((first == 0).all()):
            out = F.scaled_dot_product_attention(
                query, new.keys, new.values, is_causal=len(new) > 1, scale=scaling, enable_gqa=True
            )
        else:
            end = torch.full_like(first, len(new))
            bounds = torch.stack([first, end], 1).to(query.device)
            out, _ = flash_prefill(query, new.keys, new.values, scaling, bounds)
        if self.format.scored:
            self._score_prompt(query, new, first, scaling)
        return out

    def _score_prompt(self, query: Tensor, new: Tokens, first: Tensor, scaling: float) -> None:
        packing = self.format.packing
        new.mass = query.new_zeros(new.keys.shape[:3], dtype=torch.float32)
        new.seen = query.new_zeros(len(query), len(new), dtype=torch.float32)
        for row, start in enumerate(first.tolist()):
            length = len(new) - start
            if length == 0:
                continue
            own = slice(row, row + 1)
            probes = probe_rows(length, packing, self.format.index)
            new.mass[own, :, start:] = prompt_mass(query[own, :, start:], new.keys[own, :, start:], probes, scaling)
            new.seen[row, start:] = witnesses(probes, length, packing.normalizer == "official").to(query.device)

    def _further(self, query: Tensor, new: Tokens, first: Tensor, scaling: float) -> tuple[Tensor, Tokens, Tensor]:
        """Tokens behind others: what is packed is seen by all, the window and the chunk causally."""
        held, count = self.window.tokens(), len(new)
        if self.format.scored:
            new.mass = query.new_zeros(new.keys.shape[:3], dtype=torch.float32)
            new.seen = query.new_zeros(len(query), count, dtype=torch.float32)
        near = Tokens.joined(held, new) if len(held) else new
        near.keys, near.values = near.keys.to(query.dtype), near.values.to(query.dtype)
        begin = first if not len(held) else self.window.first
        if bool((first > 0).any()) and len(held):  # padding between the window and the chunk: close the gap
            slots = torch.arange(len(near))
            there = (slots >= begin[:, None]) & ((slots < len(held)) | (slots >= (len(held) + first)[:, None]))
            near = near.gathered(there.to(torch.int8).argsort(dim=1, stable=True).to(query.device))
            begin = (~there).sum(1)
            new, self.window = near, Window(self.window.bits, near.keys, self.format.scored)
            self.reader.forget()
        bounds = None
        if bool((begin > 0).any()):
            bounds = torch.stack([begin, torch.full_like(begin, len(near))], 1).to(query.device)
        parts = [flash_prefill(query, near.keys, near.values, scaling, bounds)]
        if segments := self.store.segments():
            parts.append(segment_attention(query, segments, scaling))
        out, lse = merge(parts)
        if self.format.scored:
            self._score_chunk(query, near, lse, begin, scaling)
            if new is not near:
                self.window.set_scores(near[: len(held)])
                new = near[len(held) :]
        return out, new, begin if new is near else first

    def _score_chunk(self, query: Tensor, near: Tokens, lse: Tensor, begin: Tensor, scaling: float) -> None:
        """Add what the probes of a chunk say to what is known of the tokens that may still be scored."""
        count, length, packing = query.shape[2], len(near), self.format.packing
        rows = probe_rows(count, packing, self.format.index).to(query.device)
        places = rows + length - count
        slots = torch.arange(length, device=query.device)
        sees = (slots <= places[:, None])[None] & (slots >= begin.to(query.device)[:, None, None])
        real = places >= begin.to(query.device)[:, None]  # [batch, P]: a probe that is padding says nothing
        sees = sees & real[..., None]
        mass = late_mass(query[:, :, rows], near.keys, lse[:, :, rows].clamp(min=-1e30), scaling, sees[:, None])
        seen = sees.sum(1).float()
        if packing.normalizer == "official":
            seen = torch.minimum(length - slots, torch.tensor(count, device=query.device)).float().expand_as(seen)
        near.add_scores(mass, seen)

    def _probe(self, query: Tensor, lse: Tensor, scaling: float) -> None:
        """The newest rows tell of the window's tokens."""
        window, held = self.window, self.window.tokens()
        slots = torch.arange(len(held))
        there = (slots >= window.first[:, None]).to(query.device)
        mass = late_mass(query, held.keys, lse, scaling, there[:, None, None])
        held.add_scores(mass, there.float() * (PROBE_EVERY if self.format.packing.normalizer == "official" else 1))
        window.set_scores(held)

    def _flush_if_due(self, new: Tokens) -> None:
        """Pack the oldest tokens if there are too many; the others stay in the window."""
        packing, window = self.format.packing, self.window
        total = len(window) + len(new)
        limit = (
            packing.window_min + packing.flush if self.store.begun else max(packing.first_flush, packing.window_min + 1)
        )
        if total >= limit:
            due = total - packing.window_min
            from_window = min(due, len(window))
            old = new[: due - from_window]
            if from_window:
                held = window.tokens()[:from_window]
                old = Tokens.joined(held, old) if len(old) else held
            self.store.pack(old, window.first.clamp(max=due))
            self.reader.forget()
            window.drop(from_window)
            new = new[due - from_window :]
            if not len(window):
                window.begin_at((window.first - (due - from_window)).clamp(min=0))
        if len(new):
            window.append(new)
            self.reader.forget()

    def _rotated(self, x: Tensor) -> Tensor:
        rotation = self.format.rotation
        return x if rotation is None else x @ rotation.to(x)

    def _note_columns(self, count: int, valid: Tensor | None) -> None:
        if valid is not None or self._valid is not None:
            batch, device = self.window.bounds.shape[0], self.device
            before = self._valid
            if before is None:
                before = torch.ones(batch, self._columns, dtype=torch.bool, device=device)
            now = torch.ones(batch, count, dtype=torch.bool, device=device) if valid is None else valid
            self._valid = torch.cat([before, now], 1)
        self._columns += count

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
        """Forget the last columns, ``-tokens_to_remove`` of them; packed tokens too, whose others stay as they are.

        Raises:
            ValueError: a positive number, or more than there are.
        """
        count = -tokens_to_remove
        if count < 0 or count > self._columns:
            allowed = f"0 to -{self._columns}"
            raise ValueError(f"crop({tokens_to_remove}) of a cache with {self._columns} columns; allowed: {allowed}")
        if count == 0:
            return
        removed = torch.full_like(self.window.first, count)
        if self._valid is not None:
            removed = self._valid[:, -count:].sum(1).cpu()
            self._valid = self._valid[:, :-count]
        self._columns -= count
        from_window = torch.minimum(removed, len(self.window) - self.window.first)
        self.window.cut(from_window)
        self.store.crop(removed - from_window)
        self.reader.forget()

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.format)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, as beam search does."""
        self._change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._change_batch(lambda held: held[indices.to(held.device)])

    def offload(self) -> None:
        """Not done: a packed layer is small, and would be moved for every token."""

    def prefetch(self) -> None:
        """As ``offload``."""

    def _change_batch(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self.window.change(change)
        self.store.change(change)
        if self._valid is not None:
            self._valid = change(self._valid)
        self.reader.forget()

    def nbytes(self) -> KVBytes:
        """Bytes of the codes, of all that is kept for the tokens, and of all tensors with their spare room."""
        if not self.is_initialized:
            return KVBytes(0, 0, 0)
        window = self.window.stored()
        payload = self.store.payload() + window.payload
        stored = self.store.payload() + self.store.overhead() + window.stored
        return KVBytes(payload, stored, allocated((self.window, self.store, self._valid)).nbytes)


def _ordered(states: Tensor, order: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim], every sequence in an order of its own, ``order`` [batch, tokens]."""
    return states.gather(2, _wide(order, states))


def _wide(order: Tensor, states: Tensor) -> Tensor:
    return order[:, None, :, None].expand(states.shape)
