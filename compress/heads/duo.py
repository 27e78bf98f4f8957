"""DuoAttention (arXiv 2410.10819): a gate for every KV head learns how much the head needs far tokens.

Two residual streams run through the frozen model: a reference stream with full attention, and a mixed stream whose
attention is, for the query heads of KV head k in layer l,

    o = alpha[l, k] full + (1 - alpha[l, k]) stream

with ``stream`` over the first ``sink`` and the newest ``recent`` tokens. As in the published code, ``full`` is the
reference stream's output, detached, so that the distillation is teacher-forced; ``teacher_forced=False`` takes the
mixed stream's own. What is minimised is

    mean over tokens behind the context, and over dimensions, of (H_full - H_mixed)^2  +  penalty * mean |alpha|

with H the hidden state after the last norm. The mean over heads is what the published penalty of 0.05 belongs to: with
the paper's sum it would be larger by the number of heads, and close them all.

On grouped-query models a fixed penalty leaves most gates near 1, and half of the heads are then ranked by noise. With a
``target`` the penalty is adapted instead, so that the gates' mean falls to it, whatever the loss's scale is.

Only the layers' inputs and the reference's attention outputs are kept: every layer runs again when its gradient is due.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.heads.data import Item
from compress.heads.layers import Layers
from compress.heads.streaming import streaming
from compress.tap import Seen

BETAS = (0.9, 0.999)  # of Adam, as is EPSILON
EPSILON = 1e-8
FALL = 0.5  # part of the steps in which the aim of the gates' mean falls from 1 to the target
GAIN = 1.0  # relative growth of the penalty a step, for each unit that the mean is above its aim
DAMPING = 10.0  # in steps of GAIN, of the part that answers at once
PENALTIES = (1e-12, 1e6)  # between which it stays
START = 1e-3  # of the loss at closed gates: an adapted penalty begins low, since Adam remembers the largest gradients


@dataclass(frozen=True)
class Settings:
    """How gates are optimised.

    Attributes:
        sink: first tokens that a streaming head sees.
        recent: newest tokens that it sees.
        steps: one item each.
        rate: of Adam, in the middle of the steps; it rises from and falls to a tenth in a fifth of them each.
        penalty: of the gates' mean, without a target.
        target: mean that the gates are to end at, by a penalty that is adapted; None leaves it as it is.
        teacher_forced: full attention is the reference stream's.
        seed: of the items' order.
    """

    sink: int = 128
    recent: int = 256
    steps: int = 2000
    rate: float = 0.02
    penalty: float = 0.05
    target: float | None = None
    teacher_forced: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What one step found, before it changed the gates: distillation loss, mean of the gates, penalty."""

    loss: float
    mean: float
    penalty: float


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Attributes:
        gates: [layers, KV heads] float32.
        moments: first and second, [2, layers, KV heads] float32.
        penalty: logarithm of what the next step begins with.
        history: of the steps made.
    """

    gates: Tensor
    moments: Tensor
    penalty: float
    history: tuple[Step, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """As tensors for a file; :meth:`from_tensors` reads them back to the same state."""
        history = torch.tensor([(s.loss, s.mean, s.penalty) for s in self.history], dtype=torch.float64).reshape(-1, 3)
        penalty = torch.tensor(self.penalty, dtype=torch.float64)
        return {"gates": self.gates, "moments": self.moments, "penalty": penalty, "history": history}

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "State":
        """The state that :meth:`tensors` was called on."""
        history = tuple(Step(*row) for row in kept["history"].tolist())
        return cls(kept["gates"], kept["moments"], float(kept["penalty"]), history)


@dataclass(frozen=True)
class Gates:
    """The outcome: values [layers, KV heads] float32, 1 in layers with a sliding window, and what every step found."""

    values: Tensor
    history: tuple[Step, ...]


def optimise(
    model: PreTrainedModel,
    items: Sequence[Item],
    settings: Settings,
    start: State | None = None,
    keep: Callable[[State], None] | None = None,
) -> Gates:
    """Find the gates.

    Args:
        model: frozen; quantized already where it will be.
        items: prompts; what is judged is everything behind their context: questions and answers.
        settings: see there.
        start: where an interrupted run was.
        keep: told the state after every step.
    """
    layers = Layers(model)
    with layers.tapped():
        streams = Streams(layers, settings)
        state = begin(streams, items[place_of(0, len(items), settings.seed)]) if start is None else start
        for step in range(len(state.history), settings.steps):
            item = items[place_of(step, len(items), settings.seed)]
            loss, gradient = streams.distill(item, state.gates)
            state = advance(state, loss, gradient, settings, layers.full)
            if keep is not None:
                keep(state)
    return Gates(state.gates, state.history)


def begin(streams: "Streams", item: Item) -> State:
    """All gates open, and an adapted penalty in proportion to what is lost if they were closed."""
    shape = (streams.layers.count, streams.layers.kv_heads)
    penalty = streams.settings.penalty
    if streams.settings.target is not None:
        penalty = START * float(streams.loss(streams.forward(item, torch.zeros(shape)), item))
    return State(torch.ones(shape), torch.zeros(2, *shape), math.log(max(penalty, PENALTIES[0])))


def place_of(step: int, items: int, seed: int) -> int:
    """The item of a step: every epoch goes through all of them in an order of its own."""
    epoch, place = divmod(step, items)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    return int(torch.randperm(items, generator=generator)[place])


def rate_at(step: int, settings: Settings) -> float:
    """The published schedule."""
    ramp = settings.steps / 5
    return settings.rate * min(1.0, max((step + 1) / ramp, 0.1), max((settings.steps - step) / ramp, 0.1))


def aim_at(step: int, settings: Settings) -> float:
    """The mean that the gates are led to at a step."""
    assert settings.target is not None
    share = min(1.0, (step + 1) / (FALL * settings.steps))
    return 1.0 + share * (settings.target - 1.0)


def regularisation(gates: Tensor, full: Sequence[int]) -> Tensor:
    """``mean |alpha|`` over all heads of the layers that attend to everything."""
    return gates[list(full)].abs().mean()


def advance(state: State, loss: float, gradient: Tensor, settings: Settings, full: Sequence[int]) -> State:
    """One step of AdamW without weight decay on ``loss + penalty * mean |alpha|``, gates kept within [0, 1].

    Args:
        state: before it.
        loss: of the distillation.
        gradient: of it, [layers, KV heads].
        settings: as in :func:`optimise`.
        full: layers that have gates.
    """
    step = len(state.history)
    log, penalty = _penalty(state, settings, full)
    with torch.enable_grad():
        gates = state.gates.clone().requires_grad_()
        (own,) = torch.autograd.grad(regularisation(gates, full), gates)
    whole = gradient + penalty * own
    first = BETAS[0] * state.moments[0] + (1 - BETAS[0]) * whole
    second = BETAS[1] * state.moments[1] + (1 - BETAS[1]) * whole.square()
    unbiased = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
    moved = state.gates - rate_at(step, settings) * unbiased[0] / (unbiased[1].sqrt() + EPSILON)
    found = Step(loss, float(regularisation(state.gates, full)), penalty)
    return State(moved.clamp(0, 1), torch.stack([first, second]), log, (*state.history, found))


def _penalty(state: State, settings: Settings, full: Sequence[int]) -> tuple[float, float]:
    """The penalty's new logarithm, and the penalty of this step: proportional and integral in the logarithm."""
    if settings.target is None:
        return state.penalty, settings.penalty
    above = float(regularisation(state.gates, full)) - aim_at(len(state.history), settings)
    low, high = (math.log(bound) for bound in PENALTIES)
    log = min(max(state.penalty + GAIN * above, low), high)
    return log, math.exp(min(max(log + DAMPING * GAIN * above, low), high))


class Streams:
    """The two streams through a model, within :meth:`Layers.tapped`.

    Args:
        layers: of the model.
        settings: as in :func:`optimise`.
    """

    def __init__(self, layers: Layers, settings: Settings) -> None:
        self.layers, self.settings = layers, settings

    def distill(self, item: Item, gates: Tensor) -> tuple[float, Tensor]:
        """``Ldistill`` of one item, and its gradient [layers, KV heads] float32, exactly 0 where all gates are 1."""
        run = self.forward(item, gates)
        with torch.enable_grad():
            last = run.mixed[-1].requires_grad_()
            loss = self.loss(run, item)
            figures = last[:, item.context :].numel()  # a mean over them has gradients below what float16 holds
            (upstream,) = torch.autograd.grad(loss * figures, last)
        return float(loss.detach()), self.backward(run, gates, upstream) / figures

    def loss(self, run: "Passed", item: Item) -> Tensor:
        """``Ldistill``: mean over tokens behind the context, and over dimensions."""
        wrong = (self.layers.norm(run.mixed[-1]) - self.layers.norm(run.reference))[0, item.context :]
        return wrong.square().mean()

    @torch.no_grad()
    def forward(self, item: Item, gates: Tensor) -> "Passed":
        """Both streams from the embedding to the last layer."""
        reference = self.layers.embed(item.ids)
        positions = self.layers.positions(reference)
        mixed, full = [reference], []
        for index in range(self.layers.count):
            shown: list[Tensor] = []

            def see(seen: Seen, shown: list[Tensor] = shown) -> Tensor:
                shown.append(seen.attend())
                return shown[0]

            reference = self.layers.run(index, reference, positions, see)
            full.append(shown[0])
            mixed.append(self._mixed(index, mixed[-1], positions, gates[index], shown[0]))
        return Passed(positions, mixed, full, reference)

    def backward(self, run: "Passed", gates: Tensor, upstream: Tensor) -> Tensor:
        """Gradient by the gates, [layers, KV heads] float32 on the CPU.

        Args:
            run: from :meth:`forward` with these gates.
            gates: [layers, KV heads].
            upstream: gradient by the mixed stream after the last layer.
        """
        found = torch.zeros_like(gates)
        first = self.layers.full[0]
        for index in range(self.layers.count - 1, first - 1, -1):
            with torch.enable_grad():
                hidden = run.mixed[index].detach().requires_grad_()
                gate = gates[index].to(hidden.device, copy=True).requires_grad_()
                output = self._mixed(index, hidden, run.positions, gate, run.full[index])
                upstream, own = torch.autograd.grad(output, (hidden, gate), upstream, allow_unused=True)
            if own is not None:  # a sliding layer has none
                found[index] = own.cpu()
        return found

    def _mixed(
        self, index: int, hidden: Tensor, positions: tuple[Tensor, Tensor], gate: Tensor, full: Tensor
    ) -> Tensor:
        """A layer of the mixed stream; ``gate`` [KV heads], ``full`` of the reference stream."""
        if index not in self.layers.full:
            return self.layers.run(index, hidden, positions, None)

        def mix(seen: Seen) -> Tensor:
            whole = full if self.settings.teacher_forced else seen.attend()
            near = streaming(seen, self.settings.sink, self.settings.recent)
            share = gate.to(whole.device).clamp(0, 1).repeat_interleave(whole.shape[2] // len(gate))[:, None]
            return (share * whole + (1 - share) * near).to(whole.dtype)

        return self.layers.run(index, hidden, positions, mix)


@dataclass(frozen=True)
class Passed:
    """Both streams after a forward pass.

    Attributes:
        positions: cosines and sines.
        mixed: of the mixed stream, the input of every layer and the output of the last, each [1, T, hidden].
        full: attention outputs of the reference stream, [1, T, heads, head_dim] a layer.
        reference: of the reference stream, the output of the last layer.
    """

    positions: tuple[Tensor, Tensor]
    mixed: list[Tensor]
    full: list[Tensor]
    reference: Tensor
