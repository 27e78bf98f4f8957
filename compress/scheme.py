"""How a quantized matrix is stored, as stages and export talk of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored: bits, columns a scale (-1: one scale a row), with or without zero points."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"G{self.group_size}"
        return f"W{self.bits}A16-{group}{'' if self.symmetric else '-asym'}"
