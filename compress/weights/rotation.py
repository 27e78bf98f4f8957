"""Norm fusion and offline rotations: the network computes the same function in a basis where outliers are spread.

With row-vector activations ``h' = h Q`` on the residual stream (R1, ``Q [hidden, hidden]`` orthogonal) and ``v' = v P``
inside every value head (R2, ``P [head_dim, head_dim]`` orthogonal), following QuaRot (arXiv 2404.00456) and RSQ:

    embedding           E  <- E Q
    q, k, v, gate, up   W  <- W diag(gamma) Q          gamma: gain of the norm before them, then set to one
    head                W  <- W diag(gamma_final) Q
    o, down             W  <- Q^T W,   b <- Q^T b
    v output            rows of each head <- P^T rows  (and its bias)
    o input             columns of each head <- columns P

RMSNorm without gain commutes with Q, attention mixes tokens and leaves the columns of a head alone, so R1 and R2 cost
nothing at run time and any loader of the architecture reads the result. Products are formed in float64. Embedding rows
are *not* centred: an RMSNorm doesn't remove the mean, so that would change the function.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.families import Family
from compress.kernels.hadamard import RotationKind, rotation, rotation_name
from compress.model import ModelFacts
from compress.schema import Weights

ROWS_AT_ONCE = 8192  # of the embedding, so that its float64 copy stays small


@dataclass(frozen=True)
class Rotations:
    """The two orthogonal matrices, float64, or None where a rotation isn't applied; their names for the report."""

    residual: Tensor | None = None
    heads: Tensor | None = None
    names: tuple[str, str] = ("none", "none")


def rotates_residual(facts: ModelFacts, settings: Weights) -> bool:
    """Whether R1 is applied: a tied head that must stay tied can't carry it."""
    return settings.rotation != "none" and not (facts.tied and settings.untie == "no")


def unties(facts: ModelFacts, settings: Weights) -> bool:
    """Whether a tied head is stored apart from the embedding."""
    return facts.tied and (settings.untie == "yes" or rotates_residual(facts, settings))


def describe(facts: ModelFacts, settings: Weights) -> tuple[str, str]:
    """What R1 and R2 will be, in words, without building them."""
    kind: RotationKind | None = settings.rotation if settings.rotation != "none" else None
    if kind is None:
        return "none", "none"
    residual = rotation_name(facts.config.hidden_size, kind) if rotates_residual(facts, settings) else "none"
    return residual, rotation_name(facts.head_dim, kind)


def make_rotations(facts: ModelFacts, settings: Weights, seed: int) -> Rotations:
    """The rotations of one run; R1 is drawn from ``2 seed``, R2 from ``2 seed + 1``."""
    if settings.rotation == "none":
        return Rotations()
    kind: RotationKind = settings.rotation
    heads, heads_name = rotation(facts.head_dim, kind, 2 * seed + 1)
    if not rotates_residual(facts, settings):
        return Rotations(None, heads, ("none", heads_name))
    residual, residual_name = rotation(facts.config.hidden_size, kind, 2 * seed)
    return Rotations(residual, heads, (residual_name, heads_name))


def rotate_layer(weights: dict[str, Tensor], family: Family, rotations: Rotations) -> dict[str, Tensor]:
    """One decoder layer in the rotated basis.

    Args:
        weights: its parameters by names relative to it, as ``ModelView.layer_weights`` gives them.
        family: names of the modules.
        rotations: R1 and R2.

    Returns:
        The same names; what changed is float32 again, with a single rounding.
    """
    turned = {name: weight.double() for name, weight in weights.items()}
    if rotations.residual is not None:
        _rotate_residual(turned, family, rotations.residual)
    if rotations.heads is not None:
        _rotate_heads(turned, family, rotations.heads)
    return {name: weight.float().contiguous() for name, weight in turned.items()}


def _rotate_residual(turned: dict[str, Tensor], family: Family, Q: Tensor) -> None:
    readers = {family.input_norm: ("q", "k", "v"), family.post_norm: ("gate", "up")}
    for norm, roles in readers.items():
        gain = turned[f"{norm}.weight"]
        for name in (f"{family.roles[role]}.weight" for role in roles):
            if name not in turned:  # of a layer that takes it from another one
                continue
            turned[name] = (turned[name] * gain) @ Q
        turned[f"{norm}.weight"] = torch.ones_like(gain)
    for role in ("o", "down"):
        module = family.roles[role]
        turned[f"{module}.weight"] = Q.t() @ turned[f"{module}.weight"]
        if f"{module}.bias" in turned:
            turned[f"{module}.bias"] = turned[f"{module}.bias"] @ Q


def _rotate_heads(turned: dict[str, Tensor], family: Family, P: Tensor) -> None:
    width = P.shape[0]
    value, output = family.roles["v"], family.roles["o"]
    if f"{value}.weight" in turned:  # else it takes another layer's, which are turned alike
        rows = turned[f"{value}.weight"]
        turned[f"{value}.weight"] = (P.t() @ rows.view(-1, width, rows.shape[1])).reshape(rows.shape)
    if f"{value}.bias" in turned:
        turned[f"{value}.bias"] = (turned[f"{value}.bias"].view(-1, width) @ P).reshape(-1)
    columns = turned[f"{output}.weight"]
    turned[f"{output}.weight"] = (columns.view(columns.shape[0], -1, width) @ P).reshape(columns.shape)


def rotate_rows(matrix: Tensor, rotations: Rotations, gain: Tensor | None = None) -> Tensor:
    """An embedding, or a head with the gain of the final norm, in the rotated basis: ``matrix diag(gain) Q``.

    Args:
        matrix: ``[vocab, hidden]`` float32. It is overwritten, a block of rows at a time.
        rotations: R1 is used.
        gain: ``[hidden]``, or None for ones.
    """
    if rotations.residual is None:
        return matrix
    for block in matrix.split(ROWS_AT_ONCE):
        rows = block.double() if gain is None else block.double() * gain.double()
        block.copy_(rows @ rotations.residual)
    return matrix
