"""Hadamard matrices built from number theory instead of shipped tables.

Paley (1933): the quadratic character chi of the finite field GF(q) gives a Hadamard matrix of order q + 1 when
q = 3 mod 4 (type I) and of order 2(q + 1) when q = 1 mod 4 (type II). Sylvester's doubling multiplies any order by 2.
Together they reach every hidden size in common use; `find_base` says which smallest matrix carries a given order.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Base:
    """The matrix that Sylvester's doubling starts from.

    Attributes:
        order: number of rows K.
        name: the construction.
        field: q, the size of the finite field of a Paley matrix; 1 for Sylvester.
    """

    order: int
    name: Literal["Sylvester", "Paley I", "Paley II"]
    field: int


def find_base(n: int) -> Base | None:
    """The smallest known Hadamard matrix of order K with n = K * 2^e; None when no construction is known.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"the order of a Hadamard matrix must be positive, got {n}")
    odd = n // (n & -n)
    if odd == 1:
        return Base(1, "Sylvester", 1)
    order = 4 * odd
    while n % order == 0:
        if order % 4 == 0 and _is_prime_power(order - 1):
            return Base(order, "Paley I", order - 1)
        if order % 8 == 4 and _is_prime_power(order // 2 - 1):
            return Base(order, "Paley II", order // 2 - 1)
        order *= 2
    return None


def base_order(n: int) -> int | None:
    """K of `find_base`, n = K * 2^e: 1 for powers of two, else the smallest odd * 2^j with j >= 2; or None."""
    base = find_base(n)
    return base.order if base else None


def base_matrix(base: Base) -> Tensor:
    """The matrix of `base`: [order, order] int8 of +-1 whose rows are orthogonal."""
    if base.name == "Sylvester":
        return torch.ones(1, 1, dtype=torch.int8)
    core = character_matrix(base.field)
    conference = torch.zeros(base.field + 1, base.field + 1, dtype=torch.int8)
    conference[1:, 1:] = core
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if base.name == "Paley I" else 1
    identity = torch.eye(base.field + 1, dtype=torch.int8)
    if base.name == "Paley I":
        return conference + identity
    doubled = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, doubled) + torch.kron(identity, diagonal)


def sylvester_matrix(n: int) -> Tensor:
    """Sylvester's (Walsh-Hadamard) matrix, natural order: [n, n] int8 of +-1; n must be a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"Sylvester's matrix needs a power of two, got {n}")
    H = torch.ones(1, 1, dtype=torch.int8)
    while H.shape[0] < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)), 0)
    return H


def character_matrix(q: int) -> Tensor:
    """chi(a_i - a_j) over GF(q): [q, q] int8; 1 for a non-zero square, -1 for a non-square, 0 on the diagonal.

    The element a_i has the base-p digits of i as its coefficients, lowest first.

    Raises:
        ValueError: q is not a power of an odd prime.
    """
    p, k = _prime_power(q) or (2, 0)
    if p == 2:
        raise ValueError(f"a quadratic character needs a power of an odd prime, got {q}")
    chi = torch.zeros(q, dtype=torch.int8)
    for exponent, element in enumerate(_powers_of_generator(p, k)):
        chi[element] = 1 if exponent % 2 == 0 else -1
    index = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for place in range(k):
        digit = index // p**place % p
        difference += (digit[:, None] - digit[None, :]).remainder(p) * p**place
    return chi[difference]


def _powers_of_generator(p: int, k: int) -> list[int]:
    """1, g, g^2, ..., g^(q-2) of a generator g of GF(p^k)*, each as the integer whose base-p digits it has.

    Tries every monic polynomial x^k = c_(k-1) x^(k-1) + ... + c_0 until x itself generates the multiplicative group,
    which proves the polynomial primitive. For k = 1 that is the search for a primitive root.
    """
    for coefficients in itertools.product(range(p), repeat=k):
        if coefficients[0] == 0:
            continue
        powers = list(_orbit_of_x(coefficients, p))
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has no primitive polynomial, which contradicts algebra")


def _orbit_of_x(coefficients: tuple[int, ...], p: int) -> Iterator[int]:
    """Powers of x modulo x^k = sum c_i x^i over GF(p), until 1 comes round again (c_0 != 0, so it does)."""
    k = len(coefficients)
    one = (1,) + (0,) * (k - 1)
    element = one
    while True:
        yield sum(digit * p**place for place, digit in enumerate(element))
        top = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((low + top * c) % p for low, c in zip(shifted, coefficients, strict=True))
        if element == one:
            return


def _is_prime_power(q: int) -> bool:
    return _prime_power(q) is not None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None
