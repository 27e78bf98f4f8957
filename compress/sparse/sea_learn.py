"""A few parameters learnt by AdamW: every step resumable to the bit, the best kept, and an end where it diverges."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RISE = 0.05  # part of the steps until the full rate
LAST = 0.05  # of the full rate, at the end of the cosine
LARGEST = 1.0  # norm of a gradient


@dataclass(frozen=True)
class Pace:
    """How parameters are learnt.

    Attributes:
        steps: of AdamW.
        rate: the full learning rate; it rises in a twentieth of the steps and falls as half a cosine.
        decay: weight decay.
        every: steps between checks.
        diverged: factor over the best check at which it has diverged.
    """

    steps: int = 1000
    rate: float = 1e-3
    decay: float = 0.01
    every: int = 50
    diverged: float = 2.0

    def rate_at(self, step: int) -> float:
        """Of a step that counts from 0."""
        cosine = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / (RISE * self.steps)) * cosine


@dataclass(frozen=True)
class Learning:
    """Everything that the next step depends on; tensors are by the parameters' names.

    Attributes:
        values: of the parameters.
        first: Adam's first moments.
        second: its second moments.
        best: values at the best check.
        checks: step and figure of every check; the first is before any step, less is better.
        step: steps made.
        diverged: whether it ended because of that.
    """

    values: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    best: dict[str, Tensor]
    checks: tuple[tuple[int, float], ...]
    step: int = 0
    diverged: bool = False

    @property
    def before(self) -> float:
        """The figure before any step."""
        return self.checks[0][1]

    @property
    def lowest(self) -> float:
        """The best figure so far."""
        return min((figure for _, figure in self.checks if math.isfinite(figure)), default=math.inf)

    def tensors(self) -> dict[str, Tensor]:
        """For a file; :meth:`from_tensors` is the inverse."""
        parts = {"values": self.values, "first": self.first, "second": self.second, "best": self.best}
        found = {f"{part}/{name}": tensor for part, content in parts.items() for name, tensor in content.items()}
        found["checks"] = torch.tensor(self.checks, dtype=torch.float64)
        found["place"] = torch.tensor([self.step, self.diverged])
        return found

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "Learning":
        """The state that :meth:`tensors` was called on."""
        parts: dict[str, dict[str, Tensor]] = {"values": {}, "first": {}, "second": {}, "best": {}}
        for key, tensor in kept.items():
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = tensor
        step, diverged = kept["place"].tolist()
        checks = tuple((int(at), figure) for at, figure in kept["checks"].tolist())
        return cls(**parts, checks=checks, step=step, diverged=bool(diverged))


def learn(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    check: Callable[[], float],
    pace: Pace,
    start: Learning | None = None,
) -> Iterator[Learning]:
    """Learn; afterwards the parameters are the best that a check found.

    Args:
        parameters: by name; they are changed in place.
        loss: of a step that counts from 0.
        check: a figure of the parameters as they are, less is better.
        pace: see there.
        start: where an interrupted run was.

    Yields:
        The state before the first step and after every one.
    """
    state = _begin(parameters, check()) if start is None else start
    optimizer = torch.optim.AdamW(parameters.values(), lr=pace.rate, weight_decay=pace.decay)
    _restore(parameters, optimizer, state)
    yield state
    while state.step < pace.steps and not state.diverged:
        for group in optimizer.param_groups:
            group["lr"] = pace.rate_at(state.step)
        with torch.enable_grad():
            optimizer.zero_grad()
            value = loss(state.step)
            value.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), LARGEST)
        healthy = bool(value.isfinite()) and bool(norm.isfinite())
        if healthy:
            optimizer.step()
        state = _after(parameters, optimizer, state, healthy, check, pace)
        yield state
    _put(parameters, state.best)


def _begin(parameters: Mapping[str, nn.Parameter], figure: float) -> Learning:
    values, best = _copy(parameters), _copy(parameters)
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    return Learning(values, first, second, best, ((0, figure),))


def _after(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Learning,
    healthy: bool,
    check: Callable[[], float],
    pace: Pace,
) -> Learning:
    """The state after one more step; a step that couldn't be made is the last."""
    step = state.step + 1
    values, best, checks = _copy(parameters), state.best, state.checks
    diverged = not healthy
    if healthy and (step % pace.every == 0 or step == pace.steps):
        figure = check()
        diverged = not figure <= pace.diverged * state.lowest
        if figure < state.lowest:
            best = _copy(parameters)
        checks = (*checks, (step, figure))
    first, second = (
        {name: optimizer.state[parameter][key].clone() for name, parameter in parameters.items()}
        for key in ("exp_avg", "exp_avg_sq")
    )
    return Learning(values, first, second, best, checks, step, diverged)


def _restore(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: Learning) -> None:
    _put(parameters, state.values)
    for name, parameter in parameters.items():
        first, second = (x[name].to(parameter.device, copy=True) for x in (state.first, state.second))
        step = torch.tensor(float(state.step))
        optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _copy(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
