"""KV heads whose tokens are packed to 2 and 4 bits.

The life of a token (arXiv 2405.14256, with what kv.md of the house adds): it waits in the window; when the window is
full its oldest tokens are scored, the first of all become sinks, the others are packed, salient ones with more bits,
and never touched again.

Everything is kept in rotated space where ``packing.rotate`` is set: ``q R . k R = q . k`` for an orthogonal R.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.evalsuite.efficiency import allocated
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.segment_attention import Segment, merge, segment_attention
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.part import Call
from compress.kv.reader import Reader
from compress.kv.rotation import Rotation
from compress.kv.saliency import late_mass, probe_rows, prompt_mass, witnesses
from compress.kv.store import Store
from compress.kv.window import Tokens, Window
from compress.plan import KVBits, Packing

PROBE_EVERY = 8  # steps of decoding between two rows whose attention is looked at


@dataclass(frozen=True)
class PackedFormat:
    """How tokens are kept.

    Attributes:
        packing: what holds for the whole cache.
        bits: of these heads.
        layer: number of the layer, which seeds its probes.
        rotation: shared by all layers, or None.
        blind: no queries are shown, so the newest tokens of a flush pass for the salient ones.
    """

    packing: Packing
    bits: KVBits
    layer: int
    rotation: Rotation | None
    blind: bool = False

    @property
    def scored(self) -> bool:
        """Whether tokens are told apart by the attention that they receive."""
        return self.bits.scored and not self.blind


class PackedPart:
    """See the module's text, and :class:`compress.kv.part.Part`.

    Args:
        format: how tokens are kept.
    """

    croppable = True

    def __init__(self, format: PackedFormat) -> None:
        self.format = format
        self.reader = Reader()
        self._steps = 0

    def fresh(self) -> "PackedPart":
        """See :class:`compress.kv.part.Part`."""
        return PackedPart(self.format)

    def begin(self, key: Tensor) -> None:
        """See :class:`compress.kv.part.Part`.

        Raises:
            ValueError: a head size that can't be packed.
        """
        if key.shape[-1] % 8:
            raise ValueError(
                f"layer {self.format.layer}: heads of {key.shape[-1]} can't be packed; allowed: a multiple of 8"
            )
        self.window = Window(self.format.packing.window_bits, key, self.format.scored)
        self.store = Store(self.format.packing, self.format.bits, key)

    def step(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        """See :class:`compress.kv.part.Part`; the new token attends to itself in full precision."""
        query, key = self._rotated(query), self._rotated(new.keys)
        new = Tokens(key, new.values)
        before, lse = self.read(query, scaling)
        out, lse = _with_itself(query, new, before, lse, scaling)
        if self.window.append(new):
            self.reader.forget()
        self._steps += 1
        if self.format.scored and self._steps % PROBE_EVERY == 0:
            self._probe(query, lse, scaling)
        self._flush_if_due(new[:0])
        return out.to(new.values.dtype)

    def read(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over what is held, of rotated queries: output and log-sum-exp [batch, heads, rows]."""
        return self.reader.read(query, self._segments, scaling)

    def chunk(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """See :class:`compress.kv.part.Part`; a prompt attends in full precision."""
        if call.alone:
            out = self._prompt(query, new, call)
            self.keep(new, call)
            return out
        query, new.keys = self._rotated(query), self._rotated(new.keys)
        out, new, first = self._further(query, new, call)
        self._take(new, first)
        return out

    def keep(self, new: Tokens, call: Call) -> None:
        """See :class:`compress.kv.part.Part`."""
        new.keys = self._rotated(new.keys)
        self._take(new, call.first)

    def tokens(self) -> Tokens:
        """All tokens in their order, unpacked, [batch, n, tokens, head_dim] float32 in the model's own space.

        Every sequence must hold equally many.
        """
        held = Tokens.joined(self.store.tokens(), self.window.tokens())
        rotation = self.format.rotation
        return held if rotation is None else Tokens(rotation.back(held.keys), held.values)

    def crop(self, removed: Tensor) -> None:
        """See :class:`compress.kv.part.Part`; packed tokens go too, and the others stay as they are."""
        from_window = torch.minimum(removed, len(self.window) - self.window.first)
        self.window.cut(from_window)
        self.store.crop(removed - from_window)
        self.reader.forget()

    def change(self, change: Change) -> None:
        """See :class:`compress.kv.part.Part`."""
        self.window.change(change)
        self.store.change(change)
        self.reader.forget()

    def nbytes(self) -> KVBytes:
        """See :class:`compress.kv.part.Part`: the codes; all that is kept for the tokens; all tensors."""
        window = self.window.stored()
        payload = self.store.payload() + window.payload
        stored = self.store.payload() + self.store.overhead() + window.stored
        return KVBytes(payload, stored, allocated((self.window, self.store)).nbytes)

    def _segments(self) -> list[Segment]:
        return [*self.store.segments(), self.window.segment()]

    def _take(self, new: Tokens, first: Tensor) -> None:
        if not len(self.window):
            self.window.begin_at(first)
        self._flush_if_due(new)

    def _prompt(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """The first tokens of all attend one another in full precision."""
        out = self._attended(query, new, call)
        if self.format.scored:
            self._score_prompt(query, new, call)
        return out

    def _attended(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        if call.ragged:
            end = torch.full_like(call.first, len(new))
            bounds = torch.stack([call.first, end], 1).to(query.device)
            return flash_prefill(query, new.keys, new.values, call.scaling, bounds)[0]
        return F.scaled_dot_product_attention(
            query, new.keys, new.values, is_causal=len(new) > 1, scale=call.scaling, enable_gqa=True
        )

    def _score_prompt(self, query: Tensor, new: Tokens, call: Call) -> None:
        packing = self.format.packing
        new.mass = query.new_zeros(new.keys.shape[:3], dtype=torch.float32)
        new.seen = query.new_zeros(len(query), len(new), dtype=torch.float32)
        for row, start in enumerate(call.first.tolist()):
            length = len(new) - start
            if length == 0:
                continue
            own = slice(row, row + 1)
            probes = probe_rows(length, packing, self.format.layer)
            mass = prompt_mass(query[own, :, start:], new.keys[own, :, start:], probes, call.scaling)
            new.mass[own, :, start:] = mass
            new.seen[row, start:] = witnesses(probes, length, packing.normalizer == "official").to(query.device)

    def _further(self, query: Tensor, new: Tokens, call: Call) -> tuple[Tensor, Tokens, Tensor]:
        """Tokens behind others: what is packed is seen by all, the window and the chunk causally."""
        held, count, first = self.window.tokens(), len(new), call.first
        scored = self.format.scored
        if scored:
            new.mass = query.new_zeros(new.keys.shape[:3], dtype=torch.float32)
            new.seen = query.new_zeros(len(query), count, dtype=torch.float32)
        near = Tokens.joined(held, new) if len(held) else new
        near.keys, near.values = near.keys.to(query.dtype), near.values.to(query.dtype)
        begin = first if not len(held) else self.window.first
        if call.ragged and len(held):  # padding between the window and the chunk: close the gap
            slots = torch.arange(len(near))
            there = (slots >= begin[:, None]) & ((slots < len(held)) | (slots >= (len(held) + first)[:, None]))
            near = near.gathered(there.to(torch.int8).argsort(dim=1, stable=True).to(query.device))
            begin = (~there).sum(1)
            new, self.window = near, Window(self.window.bits, near.keys, scored)
            self.reader.forget()
        bounds = None
        if bool((begin > 0).any()):
            bounds = torch.stack([begin, torch.full_like(begin, len(near))], 1).to(query.device)
        parts = [flash_prefill(query, near.keys, near.values, call.scaling, bounds)]
        if segments := self.store.segments():
            parts.append(segment_attention(query, segments, call.scaling))
        out, lse = merge(parts)
        if scored:
            self._score_chunk(query, near, lse, begin, call.scaling)
            if new is not near:
                self.window.set_scores(near[: len(held)])
                new = near[len(held) :]
        return out, new, begin if new is near else first

    def _score_chunk(self, query: Tensor, near: Tokens, lse: Tensor, begin: Tensor, scaling: float) -> None:
        """Add what the probes of a chunk say to what is known of the tokens that may still be scored."""
        count, length, packing = query.shape[2], len(near), self.format.packing
        rows = probe_rows(count, packing, self.format.layer).to(query.device)
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
        return x if self.format.rotation is None else self.format.rotation(x)


def _with_itself(query: Tensor, new: Tokens, out: Tensor, lse: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of one new token over others, joined by its attention to itself.

    ``out' = out + w (v - out)`` with ``w = sigmoid(s - lse)`` for its own score s; ``lse' = log(exp lse + exp s)``.
    """
    batch, heads, _, width = query.shape
    grouped = query.float().reshape(batch, new.keys.shape[1], -1, width)
    score = (grouped @ new.keys.float().transpose(2, 3)).mul_(scaling).view(batch, heads, 1)
    share = (score - lse).sigmoid_().view(*grouped.shape[:3], 1)
    joined = out.float().view(grouped.shape).lerp(new.values.float().expand(grouped.shape), share)
    return joined.view(query.shape), torch.logaddexp(lse, score)
