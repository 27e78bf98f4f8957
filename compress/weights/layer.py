"""Quantizing one decoder layer, its inputs in a file, its outputs into another.

True-sequential, as GPTQ and RSQ do it: what is quantized earlier, in this layer too, shapes the inputs of what follows.
Every piece of the layer runs once, because inputs are kept until the piece that reads them is quantized.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibrate import importance
from compress.calibrate.hessian import Hessian, gram
from compress.calibrate.importance import Spread
from compress.calibrate.stream import ActivationFile
from compress.calibrate.workers import Workers
from compress.schema import Weights
from compress.weights.gptq import Settings, Solution, relative_loss, round_to_nearest, solve
from compress.weights.grid import Grid
from compress.weights.observe import Pieces

STACKS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # what reads the same input


SHARES_BYTES = 1 << 30  # of the samples' shares of a Hessian, in memory at once


def width_of(name: str, settings: Weights) -> int:
    """Bits of a module: the first override whose pattern is found in its name, else the general width."""
    return next((bits for pattern, bits in settings.overrides.items() if re.search(pattern, name)), settings.bits)


@dataclass
class Quantized:
    """One quantized linear layer: its codes and scales, and how well they fit."""

    name: str
    bits: int
    solution: Solution
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """Everything that stays the same from layer to layer.

    Attributes:
        settings: the recipe's section.
        group_size: columns a scale, already chosen; -1 is one scale a row.
        dtype: storage type of scales.
        ids: calibration tokens ``[samples, T]``.
        counts: occurrences of every token of the vocabulary, for ``token_freq``.
        measured: whether the inputs are calibration text; if not, no Hessians are formed.
        device: where the layer runs.
        workers: the threads that treat samples side by side.
    """

    settings: Weights
    group_size: int
    dtype: torch.dtype
    ids: Tensor
    counts: Tensor
    measured: bool
    device: torch.device
    workers: Workers

    def solver(self, bits: int, columns: int) -> Settings:
        """The solver's settings for one width and input size."""
        s = self.settings
        return Settings(
            grid=Grid(bits, s.symmetric, self.dtype),
            group_size=columns if self.group_size == -1 else self.group_size,
            clip=s.clip,
            clip_steps=s.clip_grid,
            clip_norm=s.clip_norm,
            act_order=s.act_order,
            damp=s.damp,
            sweeps=s.sweeps,
        )


@dataclass
class Streams:
    """The files of a layer: what goes in, what comes out, and two for the time between."""

    inputs: ActivationFile
    outputs: ActivationFile
    attention: ActivationFile
    mlp: ActivationFile


def quantize_layer(
    pieces: Pieces,
    streams: Streams,
    work: Work,
    names: dict[str, str],
    window: int | None,
    lead: Callable[[int], None] | None = None,
) -> list[Quantized]:
    """Quantize the linear layers of one decoder layer in place, and run the calibration samples through.

    Args:
        pieces: the layer, with dense weights; afterwards it holds the dequantized ones.
        streams: ``inputs`` is read, ``outputs`` is filled.
        work: settings.
        names: full module names by role.
        window: sliding window of this layer, or None.
        lead: lets the layer that this one takes its attention from attend to a sample, in the same thread.

    Returns:
        One entry a linear layer, in the order q, k, v, o, gate, up, down.
    """
    return _LayerRun(pieces, streams, work, names, window, lead).all()


class _LayerRun:
    """One layer's passes over the samples; every method with a sample's index runs in a worker."""

    def __init__(
        self,
        pieces: Pieces,
        streams: Streams,
        work: Work,
        names: dict[str, str],
        window: int | None,
        lead: Callable[[int], None] | None,
    ) -> None:
        self.pieces, self.streams, self.work, self.names, self.window = pieces, streams, work, names, window
        self.lead = lead or (lambda _: None)
        self.samples, self.length = work.ids.shape
        self.weights: list[Tensor | None] = [None] * self.samples

    def all(self) -> list[Quantized]:
        """Every pass, and every stack quantized between two of them."""
        if self.work.settings.importance != "none" and self.work.measured:
            observed = self.work.settings.importance == "attention"
            with self.pieces.without("o") if observed else nullcontext():
                self.weights = list(self.work.workers.map(self.importance, range(self.samples)))
        readers = [role for role in ("q", "k", "v") if role in self.pieces.roles]
        done = self.fit(readers, self.attention_input)
        with self.pieces.without("o"):
            hessian = self.hessian("o", self.attend)
        done += self.quantize(("o",), hessian)
        done += self.fit(("gate", "up"), self.add_attention)
        with self.pieces.without("down"):
            hessian = self.hessian("down", self.expand)
        done += self.quantize(("down",), hessian)
        for _ in self.work.workers.map(self.add_mlp, range(self.samples)):
            pass
        return done

    def fit(self, roles: Sequence[str], inputs: Callable[[int], Tensor]) -> list[Quantized]:
        """Look at the inputs of a stack, then quantize it."""
        return self.quantize(roles, self.hessian(roles[0], inputs))

    def hessian(self, role: str, inputs: Callable[[int], Tensor]) -> Tensor | None:
        """The Hessian of all samples; None, with the pass still made, where there is no calibration text."""

        def share(i: int) -> Tensor | None:
            x = inputs(i)
            return gram(x, self.weights[i]) if self.work.measured else None

        total: Hessian | None = None
        width = self.pieces.width(role)
        ahead = min(self.work.workers.count, SHARES_BYTES // (4 * width * width))
        for part in self.work.workers.map(share, range(self.samples), ahead):
            if part is not None:
                total = total or Hessian(part.shape[0], self.work.device)
                total.add(part, self.length)
        return None if total is None else total.mean()

    def quantize(self, roles: Sequence[str], hessian: Tensor | None) -> list[Quantized]:
        """Quantize the linear layers that read one input."""
        return _quantize_stack(self.pieces, roles, self.names, hessian, self.work)

    def importance(self, i: int) -> Tensor:
        """The weight of every token of one sample ``[T]``, by the layer's dense weights."""
        self.lead(i)
        return _importance(self.pieces, self._input(i), self.work, i, self.window)

    def attention_input(self, i: int) -> Tensor:
        """What q, k, v read."""
        return self.pieces.attention_input(self._input(i))

    def attend(self, i: int) -> Tensor:
        """What o reads, kept until o is quantized."""
        self.lead(i)
        a = self.pieces.attention_output(self.attention_input(i))
        self.streams.attention[i] = a
        return a

    def add_attention(self, i: int) -> Tensor:
        """The residual stream after attention, kept; returns what gate and up read."""
        h = self._input(i) + self.pieces.linear("o")(self.streams.attention[i].to(self.work.device))
        self.streams.outputs[i] = h
        return self.pieces.mlp_input(h)

    def expand(self, i: int) -> Tensor:
        """What down reads, kept until down is quantized."""
        d = self.pieces.mlp_output(self.pieces.mlp_input(self.streams.outputs[i].to(self.work.device)))
        self.streams.mlp[i] = d
        return d

    def add_mlp(self, i: int) -> None:
        """The layer's output."""
        d = self.streams.mlp[i].to(self.work.device)
        self.streams.outputs[i] = self.streams.outputs[i].to(self.work.device) + self.pieces.linear("down")(d)

    def _input(self, i: int) -> Tensor:
        return self.streams.inputs[i].to(self.work.device)


def _importance(pieces: Pieces, hidden: Tensor, work: Work, sample: int, window: int | None) -> Tensor:
    """The weight of every token of one sample ``[T]``, by the layer's dense weights."""
    strategy, length = work.settings.importance, hidden.shape[0]
    if strategy == "attention":
        raw = torch.empty(0)

        def observe(q: Tensor, k: Tensor, scaling: float) -> None:
            nonlocal raw
            raw = importance.attention_concentration(q[0], k[0], scaling=scaling, window=window)

        pieces.look(pieces.attention_input(hidden), observe)
    elif strategy == "act_diff":
        raw = importance.act_diff(hidden, pieces.whole(hidden))
    elif strategy == "token_freq":
        raw = importance.token_freq(work.ids[sample], work.counts).to(hidden.device)
    elif strategy == "token_sim":
        raw = importance.token_sim(hidden)
    elif strategy == "act_norm":
        raw = importance.act_norm(hidden)
    else:
        raw = (importance.first_n if strategy == "first_n" else importance.first_last_n)(length, hidden.device)
    spread = Spread(work.settings.importance_min, work.settings.importance_max, work.settings.importance_power)
    return importance.weights(raw, spread)


def _quantize_stack(
    pieces: Pieces, roles: Sequence[str], names: dict[str, str], hessian: Tensor | None, work: Work
) -> list[Quantized]:
    """Quantize the linear layers that read one input, together where they have the same width."""
    done: dict[str, Quantized] = {}
    widths = {role: width_of(names[role], work.settings) for role in roles}
    for bits in dict.fromkeys(widths.values()):
        members = [role for role in roles if widths[role] == bits]
        linears = [pieces.linear(role) for role in members]
        start = time.perf_counter()
        weight = torch.cat([linear.weight for linear in linears])
        solution = quantize_matrix(
            weight, hessian, work.solver(bits, weight.shape[1]), work.settings.method, work.workers
        )
        seconds = time.perf_counter() - start
        quantized = solution.dequantized()
        first = 0
        for role, linear in zip(members, linears, strict=True):
            rows = slice(first, first + linear.out_features)
            error = float("nan") if hessian is None else relative_loss(weight[rows], quantized[rows], hessian)
            share = linear.out_features / weight.shape[0] * seconds
            done[role] = Quantized(names[role], bits, _rows(solution, rows), error, share)
            linear.weight = nn.Parameter(quantized[rows].contiguous(), requires_grad=False)
            first = rows.stop
    return [done[role] for role in roles]


def quantize_matrix(
    weight: Tensor, hessian: Tensor | None, settings: Settings, method: str, workers: Workers | None = None
) -> Solution:
    """Quantize one matrix by the recipe's method, or to nearest, with a note, where its inputs were unusable."""
    if method == "rtn" or hessian is None:
        return round_to_nearest(weight, settings, hessian)
    if not torch.isfinite(hessian).all():
        solution = round_to_nearest(weight, replace(settings, clip="mse"))
        solution.note = "its calibration inputs hold NaN or infinity: rounded to nearest"
        solution.degraded = True
        return solution
    return solve(weight, hessian, settings, workers)


def _rows(solution: Solution, rows: slice) -> Solution:
    scales = solution.scales
    part = replace(scales, scale=scales.scale[rows], zero=scales.zero[rows])
    return replace(solution, codes=solution.codes[rows], scales=part)
