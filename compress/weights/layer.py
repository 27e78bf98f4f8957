"""Quantizing one decoder layer, its inputs in a file, its outputs into another.

True-sequential, as GPTQ and RSQ do it: what is quantized earlier, in this layer too, shapes the inputs of what follows.
Every piece of the layer runs once, because inputs are kept until the piece that reads them is quantized.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibrate import importance
from compress.calibrate.hessian import Hessian
from compress.calibrate.importance import Spread
from compress.calibrate.stream import ActivationFile
from compress.schema import Weights
from compress.weights.gptq import Settings, Solution, relative_loss, round_to_nearest, solve
from compress.weights.grid import Grid
from compress.weights.observe import Pieces

STACKS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # what reads the same input


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
    """

    settings: Weights
    group_size: int
    dtype: torch.dtype
    ids: Tensor
    counts: Tensor
    measured: bool
    device: torch.device

    def bits(self, name: str) -> int:
        """Width of a module: the first override whose pattern is found in its name, or the general one."""
        for pattern, bits in self.settings.overrides.items():
            if re.search(pattern, name):
                return bits
        return self.settings.bits

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


@torch.no_grad()
def quantize_layer(
    pieces: Pieces, streams: Streams, work: Work, names: dict[str, str], window: int | None
) -> list[Quantized]:
    """Quantize the linear layers of one decoder layer in place, and run the calibration samples through.

    Args:
        pieces: the layer, with dense weights; afterwards it holds the dequantized ones.
        streams: ``inputs`` is read, ``outputs`` is filled.
        work: settings.
        names: full module names by role.
        window: sliding window of this layer, or None.

    Returns:
        One entry a linear layer, in the order q, k, v, o, gate, up, down.
    """
    device, samples = work.device, len(streams.inputs)
    weights = [_importance(pieces, streams.inputs[i].to(device), work, i, window) for i in range(samples)]

    def fit(roles: Sequence[str], inputs: Callable[[int], Tensor]) -> list[Quantized]:
        hessian = Hessian(pieces.linear(roles[0]).in_features, device)
        for i in range(samples):
            x = inputs(i)
            if work.measured:
                hessian.add(x, weights[i])
        return _quantize_stack(pieces, roles, names, hessian.mean() if work.measured else None, work)

    def attend(i: int) -> Tensor:
        a = pieces.attention_output(pieces.attention_input(streams.inputs[i].to(device)))
        streams.attention[i] = a
        return a

    def add_attention(i: int) -> Tensor:
        h = streams.inputs[i].to(device) + pieces.linear("o")(streams.attention[i].to(device))
        streams.outputs[i] = h
        return pieces.mlp_input(h)

    def expand(i: int) -> Tensor:
        d = pieces.mlp_output(pieces.mlp_input(streams.outputs[i].to(device)))
        streams.mlp[i] = d
        return d

    done = fit(STACKS[0], lambda i: pieces.attention_input(streams.inputs[i].to(device)))
    done += fit(STACKS[1], attend)
    done += fit(STACKS[2], add_attention)
    done += fit(STACKS[3], expand)
    for i in range(samples):
        streams.outputs[i] = streams.outputs[i].to(device) + pieces.linear("down")(streams.mlp[i].to(device))
    return done


def _importance(pieces: Pieces, hidden: Tensor, work: Work, sample: int, window: int | None) -> Tensor | None:
    """The weight of every token of one sample ``[T]``, by the layer's dense weights; None for plain GPTQ."""
    strategy, length = work.settings.importance, hidden.shape[0]
    if strategy == "none" or not work.measured:
        return None
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
    widths = {role: work.bits(names[role]) for role in roles}
    for bits in dict.fromkeys(widths.values()):
        members = [role for role in roles if widths[role] == bits]
        linears = [pieces.linear(role) for role in members]
        start = time.perf_counter()
        weight = torch.cat([linear.weight for linear in linears])
        solution = quantize_matrix(weight, hessian, work.solver(bits, weight.shape[1]), work.settings.method)
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


def quantize_matrix(weight: Tensor, hessian: Tensor | None, settings: Settings, method: str) -> Solution:
    """Quantize one matrix by the recipe's method, or to nearest, with a note, where its inputs were unusable."""
    if method == "rtn" or hessian is None:
        return round_to_nearest(weight, settings, hessian)
    if not torch.isfinite(hessian).all():
        solution = round_to_nearest(weight, replace(settings, clip="mse"))
        solution.note = "its calibration inputs hold NaN or infinity: rounded to nearest"
        return solution
    return solve(weight, hessian, settings)


def _rows(solution: Solution, rows: slice) -> Solution:
    scales = solution.scales
    part = replace(scales, scale=scales.scale[rows], zero=scales.zero[rows])
    return replace(solution, codes=solution.codes[rows], scales=part)
