"""Seeded orthogonal matrices for rotating weights: randomised Hadamard (QuaRot, arXiv 2404.00456) and Haar random."""

import math
from typing import Literal

import torch
from compress.kernels.hadamard.construct import find_base
from compress.kernels.hadamard.reference import hadamard_matrix
from torch import Tensor

RotationKind = Literal["hadamard", "random"]


def random_hadamard(n: int, seed: int) -> Tensor:
    """Q = diag(sign) H_n / sqrt(n): [n, n] float64, orthogonal; every entry is +-1/sqrt(n).

    The signs come from a private generator, so the global random state is neither read nor changed.

    Raises:
        ValueError: no construction is known for n.
    """
    Q = hadamard_matrix(n)
    bits = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(seed))
    return Q.mul_((2 * bits - 1).to(torch.float64) / math.sqrt(n))


def random_orthogonal(n: int, seed: int) -> Tensor:
    """A uniformly (Haar) distributed orthogonal matrix: [n, n] float64, from a private generator.

    QR of a Gaussian with the signs of diag(R) moved into Q (Mezzadri, arXiv math-ph/0609050). LAPACK's last bits can
    differ between machines and thread counts.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"the order of an orthogonal matrix must be positive, got {n}")
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q, R = torch.linalg.qr(gaussian)
    return Q.mul_(torch.where(R.diagonal() < 0, -1.0, 1.0))


def rotation_name(n: int, kind: RotationKind) -> str:
    """What `rotation` will build, in words and without building it.

    Examples: "Hadamard 36x16 (Paley II)", "Hadamard 64 (Sylvester)", "random orthogonal",
    "random orthogonal (no Hadamard construction for 188)".

    Raises:
        ValueError: unknown kind, or n is not positive.
    """
    if kind not in ("hadamard", "random"):
        raise ValueError(f"unknown kind of rotation {kind!r}; allowed: hadamard, random")
    base = find_base(n)
    if kind == "random":
        return "random orthogonal"
    if base is None:
        return f"random orthogonal (no Hadamard construction for {n})"
    order = str(n) if base.order in (1, n) else f"{base.order}x{n // base.order}"
    return f"Hadamard {order} ({base.name})"


def rotation(n: int, kind: RotationKind, seed: int) -> tuple[Tensor, str]:
    """An orthogonal matrix Q and the words that describe it.

    Args:
        n: order, for example the hidden size.
        kind: "hadamard", which falls back to a random orthogonal matrix where no construction is known, or "random".
        seed: seed of the private generator; the same n, kind and seed give the same Q.

    Returns:
        Q [n, n] float64 with Q Q^T = I, and `rotation_name(n, kind)`.

    Raises:
        ValueError: unknown kind, or n is not positive.
    """
    name = rotation_name(n, kind)
    if kind == "hadamard" and find_base(n) is not None:
        return random_hadamard(n, seed), name
    return random_orthogonal(n, seed), name
