"""SEA's estimator fitted to a frozen model, layer by layer (arXiv 2310.01777, sections 3.2 and 3.4).

The published recipe fine-tunes the whole model for long. Here the model stays as it is, and each layer's estimator
learns by itself, from the queries, keys and values that the layer sees anyway, what the layer's own attention is:

    loss = KL(attention || estimate) + sum over keys of (attention - estimate)^2,  mean over heads and sampled rows

with the estimate stretched over the keys. The terms on the student's own attention and on its outputs fall away: they
are the teacher's. Then, if asked for, the scaler learns from the output of the sparse attention.

One layer is in hand at a time: its estimator, Adam's moments, and of all sequences the residual stream before it and
its queries, keys and values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate.errors import InputError
from compress.fingerprint import kv_shape
from compress.heads.layers import Layers
from compress.sparse.sea import Shape
from compress.sparse.sea_layer import PHASES, Figures, FitSettings, LayerFit
from compress.sparse.sea_learn import Learning


@dataclass(frozen=True)
class Layer:
    """One layer that is finished: its estimator's state dict, and figures."""

    tensors: dict[str, Tensor]
    figures: Figures


@dataclass(frozen=True)
class FitState:
    """How far a fit is.

    Attributes:
        finished: layers by number.
        layer: the one in hand, or -1.
        phase: what it learns, of `PHASES`.
        learnings: of the layer in hand, by phase.
        bounds: figures of the layer in hand that don't depend on what is learnt, see `LayerFit.bounds`.
    """

    finished: dict[int, Layer] = field(default_factory=dict)
    layer: int = -1
    phase: str = PHASES[0]
    learnings: dict[str, Learning] = field(default_factory=dict)
    bounds: tuple[float, float] = (math.nan, math.nan)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors for a file; :meth:`from_tensors` reads them back to the same state."""
        found = {"place": torch.tensor([self.layer, PHASES.index(self.phase)])}
        found["bounds"] = torch.tensor(self.bounds, dtype=torch.float64)
        for phase, learning in self.learnings.items():
            found |= {f"{phase}/{name}": tensor for name, tensor in learning.tensors().items()}
        for layer, done in self.finished.items():
            found |= {f"layers/{layer}/{name}": tensor for name, tensor in done.tensors.items()}
            found[f"figures/{layer}"] = torch.tensor(list(vars(done.figures).values()), dtype=torch.float64)
        return found

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "FitState":
        """The state that :meth:`tensors` was called on."""
        layer, phase = kept["place"].tolist()
        mean_map, grid = kept["bounds"].tolist()
        learnings = {name: Learning.from_tensors(_under(kept, name)) for name in PHASES if f"{name}/place" in kept}
        finished = {
            int(number): Layer(_under(kept, f"layers/{number}"), Figures(*figures.tolist()))
            for number, figures in _under(kept, "figures").items()
        }
        return cls(finished, layer, PHASES[phase], learnings, (mean_map, grid))


@dataclass(frozen=True)
class Progress:
    """After a step.

    Attributes:
        layer: in hand.
        phase: of `PHASES`.
        step: steps made.
        steps: in all.
        figure: of the newest check.
        state: from which a fit goes on.
    """

    layer: int
    phase: str
    step: int
    steps: int
    figure: float
    state: FitState


def shape_of(model: PreTrainedModel, length: int, width: int = 256, places: int = 2048, mixed: bool = False) -> Shape:
    """The shape of a model's estimators; arguments as of `Shape`."""
    kv_heads, head_dim = kv_shape(model.config)
    heads = int(model.config.get_text_config(decoder=True).num_attention_heads)
    return Shape(heads, kv_heads, head_dim, length, places, width, mixed=mixed)


def fit(
    model: PreTrainedModel,
    ids: Tensor,
    shape: Shape,
    settings: FitSettings,
    start: FitState | None = None,
    chosen: Mapping[int, Sequence[int]] | None = None,
) -> Iterator[Progress]:
    """Fit estimators. While it runs the model attends through the tap; afterwards it is as it was.

    Args:
        model: frozen; quantized already where it will be.
        ids: tokens ``[sequences, T]``, no longer than the shape's length.
        shape: of the estimators.
        settings: see there.
        start: where an interrupted run was.
        chosen: KV heads by layer; None: all of all layers without a sliding window of the model's own.

    Yields:
        Progress after every step, and of every layer when it is finished; the last has the state with all of them.

    Raises:
        InputError: too few sequences, sequences that are too long, or layers that aren't there.
    """
    layers = Layers(model)
    if chosen is None:
        chosen = dict.fromkeys(layers.full, tuple(range(shape.kv_heads)))
    _check(ids, shape, settings, chosen, layers)
    state = FitState() if start is None else start
    with _evaluating(model), layers.tapped():
        hidden = _embedded(layers, ids)
        for index in range(max(chosen, default=-1) + 1):
            if index in chosen and index not in state.finished:
                heads = chosen[index]
                own = LayerFit(layers, hidden, index, shape.of(len(heads)), settings, heads)
                for progress in _fit_layer(own, state, settings):
                    state = progress.state
                    yield progress
            _advance(layers, index, hidden)


def _fit_layer(layer: LayerFit, state: FitState, settings: FitSettings) -> Iterator[Progress]:
    """All phases of a layer, or what is left of them; the last progress has it among the finished."""
    if state.layer != layer.index:
        state = FitState(state.finished, layer.index, bounds=layer.bounds())
    steps = 0
    for phase in layer.phases:
        steps = settings.map.steps if phase == "map" else settings.mix.steps
        for learning in layer.learn(phase, state.learnings.get(phase)):
            state = replace(state, phase=phase, learnings=state.learnings | {phase: learning})
            if learning.step:
                yield Progress(layer.index, phase, learning.step, steps, learning.checks[-1][1], state)
    done = Layer(layer.tensors(), Figures.of(state.learnings, state.bounds))
    finished = FitState(state.finished | {layer.index: done})
    yield Progress(layer.index, state.phase, steps, steps, done.figures.after, finished)


def _check(
    ids: Tensor, shape: Shape, settings: FitSettings, chosen: Mapping[int, Sequence[int]], layers: Layers
) -> None:
    if not 1 <= settings.held_out < len(ids):
        allowed = f"1 to {len(ids) - 1} of {len(ids)} sequences"
        raise InputError(
            "held_out", settings.held_out, "leaves nothing to learn or nothing to judge by", allowed=allowed
        )
    if ids.shape[1] > shape.length:
        raise InputError("length", ids.shape[1], "is longer than the estimator", allowed=f"at most {shape.length}")
    other = sorted(set(chosen) - set(layers.full))
    if other:
        allowed = ", ".join(map(str, layers.full))
        raise InputError("layers", other[0], "isn't a layer that attends to everything", allowed=allowed)


def _under(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of a part of a file, by their names in it."""
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in kept.items() if key.startswith(f"{prefix}/")}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode; gradients are the business of whoever is told of progress in between."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def _embedded(layers: Layers, ids: Tensor) -> list[Tensor]:
    return [layers.embed(row) for row in ids]


@torch.no_grad()
def _advance(layers: Layers, index: int, hidden: list[Tensor]) -> None:
    """From a layer's input to the next one's, in place."""
    positions = layers.positions(hidden[0])
    for sequence, before in enumerate(hidden):
        hidden[sequence] = layers.run(index, before, positions, None)
