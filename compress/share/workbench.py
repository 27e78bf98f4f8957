"""Where sharing is tried: a model in memory, windows that projections are fitted on, and windows that are held out."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from compress.calibrate.stream import ActivationFile
from compress.plan import Residual, Share
from compress.schema import Sharing
from compress.share.pairs import MODES
from compress.share.refit import Fit, fit, targets
from compress.share.residual import fit_scores
from compress.share.similarity import Similarity
from compress.share.trial import Course, Fitted, Trial


@dataclass(frozen=True)
class Text:
    """Windows of the calibration text.

    Attributes:
        held: [N, T], that losses are measured on.
        fit: [M, T], that projections are fitted on.
    """

    held: Tensor
    fit: Tensor


class Workbench:
    """Lets layers share, refits them and measures; see ``compress.share.search.Bench``.

    Args:
        trial: within ``at_work``, nothing shared.
        text: the windows.
        settings: the recipe's section.
        similarity: of the layers' attention; None where heads aren't matched.
        folder: where streams of the windows go.
    """

    def __init__(
        self, trial: Trial, text: Text, settings: Sharing, similarity: Similarity | None, folder: Path
    ) -> None:
        self.trial, self.text, self.settings, self.similarity = trial, text, settings, similarity
        self.fits: dict[int, Fit] = {}
        self.folder = folder
        self._targets: dict[int, ActivationFile] = {}

    def open(self, layers: Iterable[int], sources: Iterable[int]) -> None:
        """Compute what fits of some layers need of the dense model.

        Args:
            layers: that may take.
            sources: that may give.
        """
        layers = sorted(layers)
        stops = sorted({*layers, *sources})
        self.held = Course(self.trial, self.text.held, self.folder / "held", stops)
        self.course = Course(self.trial, self.text.fit, self.folder / "fit", stops)
        for layer in layers if self.refits else ():
            path = self.folder / f"target-{layer:05d}.bin"
            self._targets[layer] = targets(self.trial, self.course, layer, path)

    @property
    def refits(self) -> bool:
        """Whether anything is fitted."""
        return self.settings.refit != "none"

    def close(self) -> None:
        """Remove the files."""
        self.held.close()
        self.course.close()
        for file in self._targets.values():
            file.path.unlink(missing_ok=True)
        self._targets.clear()

    def share_of(self, layer: int, source: int) -> Share:
        """How a layer takes from another."""
        mode = MODES[self.settings.method]
        if mode != "attn" or self.settings.heads == "same" or self.similarity is None:
            return Share(mode, source)  # type: ignore[arg-type]
        return Share("attn", source, self.similarity.head_map(layer, source))

    def shares(self) -> dict[int, Share]:
        """Layers that share."""
        return dict(self.trial.shares)

    def fitted(self) -> dict[int, Fitted]:
        """Projections of those that were fitted."""
        return {layer: found.fitted for layer, found in self.fits.items()}

    def dense(self) -> float:
        """Held-out loss of the dense model; nothing is shared yet."""
        return self.loss(self.trial.view.count - 1)

    def loss(self, changed: int) -> float:
        """Held-out loss of the model as it is, whose layers before ``changed`` are as the streams have them."""
        total = sum(self.trial.nll(self.held.final(window, changed), ids) for window, ids in enumerate(self.text.held))
        self.trial.forget()
        return total / (len(self.text.held) * (self.text.held.shape[1] - 1))

    def nearest(self, layer: int, sources: list[int]) -> int:
        """Of some layers the one whose attention changes a layer's output least; the last one if that isn't known."""
        known = self.similarity
        if known is None:
            return sources[-1]
        maps = {source: self.share_of(layer, source).head_map for source in sources}
        return min(sources, key=lambda source: known.relative_change(layer, source, maps[source]))

    def attempt(self, layer: int, source: int, shares: Mapping[int, Share]) -> tuple[float, float, float]:
        """See :class:`compress.share.search.Bench`."""
        fitted = self.fitted()
        self.trial.share({**shares, layer: self.share_of(layer, source)}, fitted)
        found = self._fit(layer)
        loss = self.loss(layer)
        self.trial.share(shares, fitted)
        return (loss, math.nan, math.nan) if found is None else (loss, found.before, found.after)

    def add(self, layer: int, source: int) -> float:
        """Let a layer share from now on; those behind it are fitted again.

        Returns:
            The held-out loss.
        """
        return self.add_all({layer: self.share_of(layer, source)})

    def add_all(
        self,
        shares: Mapping[int, Share],
        done: Mapping[int, Fit] | None = None,
        keep: Callable[[int, Fit], None] | None = None,
    ) -> float:
        """Let layers share from now on, fitted one after the other, and those behind them again.

        Args:
            shares: of the layers.
            done: fits that an earlier attempt has finished.
            keep: told of every fit that is finished.

        Returns:
            The held-out loss.
        """
        first = min(shares)
        everything = {**self.trial.shares, **shares}
        self.trial.share(everything, {layer: own for layer, own in self.fitted().items() if layer < first})
        for course in (self.held, self.course):
            course.changed(first)
        for layer in sorted(layer for layer in everything if layer >= first):
            found = (done or {}).get(layer)
            if found is not None:
                if found.scores is not None:
                    self._correct(layer, found.scores[0])
                self.trial.put(layer, found.fitted)
            elif (found := self._fit(layer)) is None:
                continue
            elif keep is not None:
                keep(layer, found)
            self.fits[layer] = found
        return self.loss(first)

    def _fit(self, layer: int) -> Fit | None:
        if not self.refits:
            return None
        scores, damp = None, self.settings.damp
        if self.settings.score_rank:
            scores = fit_scores(self.trial, self.course, layer, self.settings.score_rank, damp)
            self._correct(layer, scores[0])
        values = self.settings.refit == "values"
        found = fit(self.trial, self.course, layer, self._targets[layer], damp, values)
        self.trial.forget()
        return replace(found, scores=scores)

    def _correct(self, layer: int, residual: Residual) -> None:
        self.trial.exchange(layer, replace(self.trial.shares[layer], residual=residual))
