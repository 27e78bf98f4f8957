"""What end-to-end tuning learns: a relative change of every scale and norm, and Adam that finds it.

Adam (arXiv 1412.6980), algorithm 1, with the learning rate of a short warm-up and half a cosine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

WARM_UP = 4  # steps until the full rate
LAST_RATE = 0.05  # of the full rate, at the end of the cosine
BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass
class Learned:
    """What is learnt: ``d`` of every scale and norm by tensor name, float32, with Adam's two moments."""

    d: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    steps: int = 0

    @classmethod
    def nothing(cls) -> "Learned":
        """The model as its files have it."""
        return cls({}, {}, {})

    @classmethod
    def zeros(cls, shapes: Mapping[str, torch.Size]) -> "Learned":
        """Nothing learnt yet."""
        d, first, second = ({name: torch.zeros(shape) for name, shape in shapes.items()} for _ in range(3))
        return cls(d, first, second)

    def factor(self, name: str) -> Tensor | float:
        """``1 + d`` of a tensor; 1 for one that isn't learnt."""
        return 1 + self.d[name] if name in self.d else 1.0

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a file with what was learnt, in the file's type."""
        return (tensor.float() * self.factor(name)).to(tensor.dtype) if name in self.d else tensor

    def update(self, name: str, gradient: Tensor, rate: float) -> None:
        """Adam, for one tensor; ``steps`` counts the finished steps."""
        m, v = self.first[name], self.second[name]
        m.lerp_(gradient, 1 - BETAS[0])
        v.lerp_(gradient.square(), 1 - BETAS[1])
        step = self.steps + 1
        m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
        self.d[name] -= rate * m_hat / (v_hat.sqrt() + EPSILON)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {
            f"{kind}/{name}": tensor
            for kind, part in (("d", self.d), ("first", self.first), ("second", self.second))
            for name, tensor in part.items()
        }

    @classmethod
    def load(cls, path: Path, steps: int) -> "Learned":
        """The inverse of ``tensors``."""
        parts: dict[str, dict[str, Tensor]] = {"d": {}, "first": {}, "second": {}}
        for key, tensor in load_file(path).items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
        return cls(parts["d"], parts["first"], parts["second"], steps)


def rate_at(step: int, steps: int, full: float) -> float:
    """The learning rate of a step that counts from 0: a short rise, then half a cosine."""
    cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return full * min(1.0, (step + 1) / WARM_UP) * cosine
