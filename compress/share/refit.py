"""What a layer that shares has left is fitted to what its attention gave before: ridge regression in closed form.

With ``A`` what the output projection gets (probabilities of the owner times the layer's own values, or its own queries
over the owner's keys and values) and ``Y`` the dense layer's attention output,

    W = argmin ||A W^T - Y||^2 + damp mean(diag A^T A) ||W - W_o||^2

so that a layer that takes what it had anyway isn't changed. ``A`` is that of the model in which all layers before share
already, as GPTQ propagates errors. Values enter linearly too, through attention: they are fitted in turn by conjugate
gradients, which need no matrix of their own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.calibrate.stream import ActivationFile
from compress.plan import Residual
from compress.share.modules import AttentionConsumer
from compress.share.trial import Course, Fitted, Trial, whole

VALUE_STEPS = 6


@dataclass(frozen=True)
class Fit:
    """A consumer's projections, and how far its output is from the dense layer's.

    Attributes:
        fitted: the projections.
        before: squared error with the layer's own projections, as a share of the squared output.
        after: the same with the fitted ones, on the windows that they were fitted on.
        scores: the score residual and its errors, see :func:`compress.share.residual.fit_scores`.
    """

    fitted: Fitted
    before: float
    after: float
    scores: tuple[Residual, float, float] | None = None


def targets(trial: Trial, course: Course, layer: int, path: Path) -> ActivationFile:
    """A layer's attention outputs in the dense model, [N, T, hidden].

    Args:
        trial: in which nothing is shared.
        course: of the windows.
        layer: the layer.
        path: of the file.
    """
    dense, count = trial.dense[layer], len(course.ids)
    given = (trial.attend(dense, layer, course.stream(window, layer)) for window in range(count))
    return whole(path, (*course.ids.shape, trial.view.config.hidden_size), given)


def fit(trial: Trial, course: Course, layer: int, target: ActivationFile, damp: float, values: bool = False) -> Fit:
    """Fit a layer that shares, and leave it so in the trial.

    Args:
        trial: in which the layer shares, with its own projections, and those before it with theirs.
        course: of the windows.
        layer: the layer.
        target: its dense attention outputs.
        damp: see the module's text.
        values: fit its value projection too.

    Raises:
        ValueError: there is nothing that values could be fitted in.
    """
    if values and not isinstance(trial.attention(layer), AttentionConsumer):
        raise ValueError(f"layer {layer} has no values of its own")
    problem = _Problem(trial, course, layer, target)
    fitted, before, after = _output(problem, damp)
    trial.put(layer, fitted)
    if values:
        trial.put(layer, fitted := Fitted(fitted.output, _values(problem)))
        fitted, _, after = _output(problem, damp, fitted.value)
        trial.put(layer, fitted)
    return Fit(fitted, before, after)


@dataclass(frozen=True)
class _Problem:
    """One layer's inputs and outputs, window by window."""

    trial: Trial
    course: Course
    layer: int
    target: ActivationFile

    def windows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the attention gets, [1, T, hidden], and is to give, [T, hidden]; its owner's attention is at hand."""
        for window in range(len(self.course.ids)):
            stream = self.course.stream(window, self.layer)
            yield self.trial.normed(self.layer, stream), self.target[window].to(stream)

    def inputs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of the output projection, [T, H * D], what it gives [T, hidden], and what it is to give."""
        attention = self.trial.attention(self.layer)
        seen: list[Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        try:
            for normed, wanted in self.windows():
                positions = self.trial.view.positions(normed)
                given = attention(hidden_states=normed, position_embeddings=positions)[0][0]
                yield seen.pop().float(), given.float(), wanted.float()
        finally:
            hook.remove()


def _output(problem: _Problem, damp: float, value: Tensor | None = None) -> tuple[Fitted, float, float]:
    """The output projection, and relative squared errors before and after."""
    weight = problem.trial.attention(problem.layer).o_proj.weight
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.float64, device=weight.device)
    error = norm = 0.0
    for inputs, given, wanted in problem.inputs():
        left = wanted - given
        gram += (inputs.t() @ inputs).double()
        cross += (inputs.t() @ left).double()
        error += float(left.double().square().sum())
        norm += float(wanted.double().square().sum())
    ridge = damp * float(gram.diagonal().mean())
    if not math.isfinite(ridge + error):
        raise ValueError(f"layer {problem.layer}: its attention gives NaN or infinite values on the windows")
    if error == 0 or ridge == 0:
        return Fitted(weight.detach().float().clone(), value), error / (norm or 1.0), error / (norm or 1.0)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    step = torch.cholesky_solve(cross, factor)
    after = error - 2 * float((step * cross).sum()) + float((step * (gram @ step)).sum())
    output = (weight.double() + step.t()).to(torch.float32)
    norm = norm or error  # a layer whose attention gave nothing
    return Fitted(output, value), error / norm, max(0.0, after) / norm


def _values(problem: _Problem) -> Tensor:
    """The value projection after a few steps of conjugate gradients on the squared error."""
    attention = problem.trial.attention(problem.layer)
    start = attention.v_proj.weight.detach().float().clone()
    step = torch.zeros_like(start)
    left = -_gradient(problem, start, True)  # J^T (Y - J v)
    direction, size = left.clone(), float(left.square().sum())
    for _ in range(VALUE_STEPS):
        if size <= 0 or not math.isfinite(size):
            break
        turned = _gradient(problem, direction, False)  # J^T J d
        length = size / float((direction * turned).sum().clamp(min=torch.finfo(turned.dtype).tiny))
        step += length * direction
        left -= length * turned
        size, former = float(left.square().sum()), size
        direction = left + size / former * direction
    return start + step


def _gradient(problem: _Problem, weight: Tensor, against_target: bool) -> Tensor:
    """Of ``0.5 ||J w - Y||^2`` with respect to a value projection ``w``, ``Y`` and biases 0 if not asked for."""
    attention = problem.trial.attention(problem.layer)
    found = torch.zeros_like(weight)
    for normed, wanted in problem.windows():
        with torch.enable_grad():
            own = weight.to(normed.dtype).requires_grad_()
            bias, output_bias = (getattr(attention, name).bias for name in ("v_proj", "o_proj"))
            value = torch.nn.functional.linear(normed, own, bias if against_target else None)
            value = value.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            mixed = attention.mixed(value, normed, problem.trial.view.positions(normed))
            flat = mixed.transpose(1, 2).flatten(2)
            given = torch.nn.functional.linear(flat, attention.o_proj.weight, output_bias if against_target else None)
            apart = given[0] - wanted if against_target else given[0]
            found += torch.autograd.grad(0.5 * apart.float().square().sum(), own)[0].float()
    return found
