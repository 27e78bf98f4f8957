"""Bits of every layer, chosen from calibration: the least summed error of attention under a budget of bytes.

Each layer is given the calibration windows as the model gives them, and its attention is computed by PyTorch, and
through a packed layer of the runtime for each way of packing that may be chosen. The windows' first part is a prompt,
the rest follows behind it, and what is compared are the rest's outputs:

    e(l, c) = sum |o_c - o|^2 / sum |o|^2

The choice minimises ``sum_l e(l, c_l)`` over the ways ``c_l`` with ``sum_l bytes(c_l) <= budget``: a small integer
programme, solved exactly by HiGHS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from compress.calibrate.stream import ActivationFile
from compress.kv.layer import Cluster, PlanLayer
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.rotation import Rotation
from compress.model import ModelView
from compress.plan import KVBits, Packing
from compress.share.echo import Led
from compress.share.view import SharedView
from compress.tap import NAME, Seen

CANDIDATES = (
    *(KVBits(high=(4, 4), low=(2, 2), ratio=ratio) for ratio in (0.0, 0.1, 0.3, 0.6, 1.0)),
    KVBits(high=(4, 2), low=(4, 2), ratio=1.0),
)
"""Ways of packing a layer: from no salient token at 4 bits to all of them; and 4-bit keys with 2-bit values."""

WINDOWS = 8  # of the calibration text, at most
TAIL = 4  # one part of so many of a window follows behind the prompt


@dataclass(frozen=True)
class Choice:
    """What was chosen for the layers that are packed.

    Attributes:
        bits: of each layer, in their order.
        errors: relative squared error of each.
        nbytes: of all of them together.
    """

    bits: tuple[KVBits, ...]
    errors: tuple[float, ...]
    nbytes: int


class Profile:
    """Runs a model's layers one after the other over calibration windows.

    Args:
        view: the model, quantized already where it will be.
        packing: how the cache packs.
        device: where layers run.
        hidden: residual stream of all windows, ``[windows, T, hidden]``; changed from layer to layer.
    """

    def __init__(self, view: ModelView, packing: Packing, device: torch.device, hidden: ActivationFile) -> None:
        self.view, self.packing, self.device, self.hidden = view, packing, device, hidden
        self._length = hidden.shape[1]
        self._rotation = Rotation(view.facts.head_dim) if packing.rotate else None
        cos, sin = view.position_embeddings(self._length)
        self._led: dict[int, list[Led]] = {}  # of all windows, what layers take from a layer
        self._positions = (cos.to(device), sin.to(device))

    @torch.no_grad()
    def layer(self, index: int, candidates: Sequence[KVBits], heads: Sequence[int] | None = None) -> list[float]:
        """Run a layer over all windows.

        Args:
            index: of the layer.
            candidates: ways of packing it.
            heads: the KV heads that are packed; None for all.

        Returns:
            The error of each candidate, over the query heads of these KV heads; 0 where there are none.
        """
        view = self.view
        layer = view.build_layer(index, view.layer_weights(index)).to(self.device)
        layer.get_submodule(view.family.attention).config._attn_implementation = NAME  # type: ignore[union-attr]
        mask, share = view.attention_mask(index, self._length), view.facts.shares.get(index)
        wrong, whole = [0.0] * len(candidates), 0.0

        def compare(seen: Seen) -> Tensor:
            nonlocal whole
            first = prompt_tokens(self._length)
            output = seen.attend()
            own_heads = list(range(seen.key.shape[1]) if heads is None else heads)
            if not own_heads:
                return output
            query, wanted = (_grouped(x, seen.key.shape[1], own_heads) for x in (seen.query, output.transpose(1, 2)))
            key, value = seen.key[:, own_heads], seen.value[:, own_heads]
            wanted = wanted[:, :, first:]
            whole += float(wanted.double().square().sum())
            for number, bits in enumerate(candidates):
                own = PackedPart(PackedFormat(self.packing, bits, index, self._rotation))
                packed = PlanLayer(index, [Cluster(None, own)])
                for part in (slice(0, first), slice(first, None)):
                    packed.update(key[:, :, part], value[:, :, part])
                    found = packed.attend(query[:, :, part], None, seen.scaling)
                wrong[number] += float((found - wanted).double().square().sum())
            return output

        for window in range(len(self.hidden)):
            if share is not None and isinstance(view, SharedView):
                view.echo.put(share.source, self._led[share.source][window])
            output = layer(
                self.hidden[window].unsqueeze(0).to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                position_embeddings=self._positions,
                tap=compare if candidates else None,
            )
            self.hidden[window] = output[0]
            if isinstance(view, SharedView) and index in view.facts.sharing and share is None:
                self._led.setdefault(index, []).append(view.echo.of(index))
        return [error / max(whole, 1e-30) for error in wrong]


def _grouped(states: Tensor, kv_heads: int, chosen: list[int]) -> Tensor:
    """The query heads ``[batch, heads, ...]`` of some KV heads."""
    return states.unflatten(1, (kv_heads, -1))[:, chosen].flatten(1, 2)


def prompt_tokens(length: int) -> int:
    """How many tokens of a calibration window are the prompt."""
    return length - length // TAIL


def choose(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> Choice:
    """The ways of packing with the least summed error.

    Args:
        errors: of each layer and each of ``CANDIDATES``.
        sizes: bytes of each layer packed by each of them.
        limit: bytes that all layers may take together.

    Raises:
        ValueError: no choice fits.
    """
    cost, room = (np.asarray(table, dtype=np.float64) for table in (errors, sizes))
    layers, ways = cost.shape
    scale = max(float(cost.max()), 1e-30)
    one_each = np.kron(np.eye(layers), np.ones(ways))
    found = milp(
        (cost / scale).ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(room.reshape(1, -1), 0, limit),
        ],
        integrality=np.ones(layers * ways),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise ValueError(f"no choice of bits for {layers} layers takes at most {limit} bytes")
    picked = found.x.reshape(layers, ways).argmax(1)
    return Choice(
        tuple(CANDIDATES[way] for way in picked),
        tuple(float(cost[layer, way]) for layer, way in enumerate(picked)),
        sum(int(sizes[layer][way]) for layer, way in enumerate(picked)),
    )
