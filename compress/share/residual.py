"""A score residual (LISA, arXiv 2408.01890): what a layer that takes scores adds to them, fitted in closed form.

A layer's own scores are a sum over the planes that rotary embedding turns, ``S_h = sum_f <q_f, k_f>``. A low-rank
correction that leaves positions what they are can only keep some of them: with ``x = (S_p, <q_1, k_1>, ...)`` the
scores that are taken and the layer's own planes, coefficients ``c`` of the former and of the planes that are kept
minimise

    sum over rows of Var_P(c x - S_h) + damp sum_f Var_P(x_f) (c_f - t_f)^2,   t = (0, 1, 1, ...)

where the variance is over the keys of a row under the layer's own probabilities ``P``: twice the divergence of the two
attentions to second order, which a constant added to a row doesn't change. All of it is in one Gram matrix of D / 2 + 1
numbers a side for each head. Planes are chosen one after the other, those of a KV head together, since its keys are
cached; with all of them the layer's own scores come out.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from compress.plan import Residual
from compress.share.trial import Course, Trial

ROWS = 48  # of a window
SEED = 0


def fit_scores(trial: Trial, course: Course, layer: int, rank: int, damp: float) -> tuple[Residual, float, float]:
    """Choose planes and coefficients for a layer that takes attention.

    Args:
        trial: in which the layer shares, and those before it as they will.
        course: of the windows.
        layer: the layer.
        rank: channels of a key that the layer keeps, even.
        damp: see the module's text.

    Returns:
        The residual, and the error above without damping, as a share of ``Var_P(S_h)``, with nothing added and with it.
    """
    generator = torch.Generator().manual_seed(SEED)
    gram = sum(_window(trial, course, layer, window, generator) for window in range(len(course.ids)))
    assert isinstance(gram, Tensor)
    kv_heads = int(trial.view.config.num_key_value_heads)
    grouped = gram.unflatten(0, (kv_heads, -1))  # [Hkv, group, F, F]
    planes, gains, scales = [], [], []
    for own in grouped:
        kept, found = _chosen(own, rank // 2, damp)
        planes.append(tuple(kept))
        gains += found[:, 0].tolist()
        scales += [tuple(row) for row in found[:, [1 + plane for plane in kept]].tolist()]
    residual = Residual(tuple(planes), tuple(gains), tuple(scales))
    return residual, *_errors(grouped, residual)


def _window(trial: Trial, course: Course, layer: int, window: int, generator: torch.Generator) -> Tensor:
    """Covariances that one window gives, [H, F, F]."""
    dense, consumer = trial.dense[layer], trial.attention(layer)
    normed = trial.normed(layer, course.stream(window, layer))
    query, key = _looked(dense, normed, trial.view.positions(normed))
    taken = consumer.echo.of(consumer.source).mapped(consumer.head_map)
    heads, tokens = query.shape[1], query.shape[2]
    rows = torch.randperm(tokens, generator=generator)[:ROWS].sort().values.to(query.device)
    hidden = torch.arange(tokens, device=rows.device) > rows[:, None]
    grams = []
    for head in range(heads):
        own, other = (part[0, head * part.shape[1] // heads] for part in (key, taken[1]))
        by_plane = _by_plane(query[0, head, rows], own) * dense.scaling
        scores = (taken[0][0, head, rows] @ other.t()) * dense.scaling
        probabilities = by_plane.sum(2).masked_fill(hidden, -torch.inf).softmax(-1)
        grams.append(_covariance(torch.cat([scores[..., None], by_plane], 2), probabilities))
    return torch.stack(grams)


def _looked(attention: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries [1, H, T, D] and keys [1, Hkv, T, D] of a whole attention module, after rotary embedding."""
    cos, sin = (table.unsqueeze(1) for table in positions)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query, key = (part(hidden).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj))
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def _by_plane(query: Tensor, key: Tensor) -> Tensor:
    """Scores of queries [R, D] and keys [T, D] by plane, [R, T, D / 2]."""
    return torch.einsum("rcf,tcf->rtf", query.unflatten(1, (2, -1)), key.unflatten(1, (2, -1)))


def _covariance(features: Tensor, probabilities: Tensor) -> Tensor:
    """Of features [R, T, F] under probabilities [R, T], summed over rows, [F, F] float64."""
    mean = (features * probabilities[..., None]).sum(1, keepdim=True)
    apart = ((features - mean) * probabilities[..., None].sqrt()).flatten(0, 1)
    return (apart.t() @ apart).double().cpu()


def _chosen(gram: Tensor, count: int, damp: float) -> tuple[list[int], Tensor]:
    """Planes of one KV head, greedily, and coefficients of its query heads, [group, F].

    Args:
        gram: [group, F, F].
        count: how many planes.
        damp: see the module's text.
    """
    kept: list[int] = []
    found = _solved(gram, [0], damp)
    for _ in range(count):
        left = [plane for plane in range(gram.shape[1] - 1) if plane not in kept]
        tried = [_solved(gram, [0, *(1 + other for other in (*kept, plane))], damp) for plane in left]
        errors = [float(_error(gram, coefficients).sum()) for coefficients in tried]
        best = errors.index(min(errors))
        kept.append(left[best])
        found = tried[best]
    return sorted(kept), found


def _solved(gram: Tensor, free: list[int], damp: float) -> Tensor:
    """Coefficients [group, F], zero where they aren't free."""
    own = _own(gram)
    held = [index for index in range(gram.shape[1]) if index not in free]
    inner = gram[:, free][:, :, free]
    diagonal = gram.diagonal(dim1=1, dim2=2)[:, free]
    ridge = torch.diag_embed(damp * diagonal + torch.finfo(torch.float32).tiny)
    moved = torch.linalg.solve(inner + ridge, gram[:, free][:, :, held] @ own[held])
    found = torch.zeros(gram.shape[:2], dtype=gram.dtype)
    found[:, free] = own[free] + moved
    return found


def _own(gram: Tensor) -> Tensor:
    """Coefficients of the layer's own scores."""
    own = torch.ones(gram.shape[1], dtype=gram.dtype)
    own[0] = 0
    return own


def _error(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Of coefficients [group, F], [group]."""
    apart = coefficients - _own(gram)
    return torch.einsum("gf,gfe,ge->g", apart, gram, apart)


def _errors(grouped: Tensor, residual: Residual) -> tuple[float, float]:
    """Without and with a residual, as a share of the own scores' variance."""
    gram = grouped.flatten(0, 1)
    plain = torch.zeros(gram.shape[:2], dtype=gram.dtype)
    norm = float(_error(gram, plain).sum()) or 1.0
    fitted, group = plain.clone(), grouped.shape[1]
    plain[:, 0] = 1
    for head, (gain, scales) in enumerate(zip(residual.gain, residual.scale, strict=True)):
        fitted[head, 0] = gain
        fitted[head, [1 + plane for plane in residual.planes[head // group]]] = torch.tensor(scales).to(fitted)
    return float(_error(gram, plain).sum()) / norm, max(0.0, float(_error(gram, fitted).sum())) / norm
