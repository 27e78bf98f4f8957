"""What the stage ``share`` finds out, each part kept in the work folder as soon as it is there.

A kill loses the window, the trial or the fit in hand. Streams of hidden states, which are large and quickly made, are
made again.
"""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from compress.events import Message, StepDone
from compress.job import Job
from compress.kv.copying import best, copying_scores, how_many
from compress.plan import Residual, Share
from compress.schema import Sharing
from compress.share import kvsharer
from compress.share.modules import share_layers
from compress.share.pairs import Candidates, blocks, candidates, named
from compress.share.refit import Fit
from compress.share.search import Measured, State, search
from compress.share.similarity import Similarity, look
from compress.share.timing import decode_times
from compress.share.trial import Course, Fitted, Trial, put
from compress.share.workbench import Text, Workbench
from compress.tap import Seen

WINDOWS = 8  # that similarity is looked at on
STATE = "share"


class Sharer:
    """Looks at a model's layers, chooses some that share, and fits them; or goes on with it.

    Args:
        job: the run, with calibration text; the stage's state keeps how far it is.
        settings: the section.
        model: dense, frozen, in float32.
    """

    def __init__(self, job: Job, settings: Sharing, model: PreTrainedModel) -> None:
        assert job.calibration is not None  # see ShareStage.preflight
        self.job, self.settings, self.model = job, settings, model
        self.state: dict[str, Any] = job.folder.stage(STATE)
        self.scratch = job.folder.path / "share-scratch"
        held, fit = job.calibration.ids.split(
            [settings.check_windows, len(job.calibration.ids) - settings.check_windows]
        )
        self.text = Text(held, fit)
        self.trial = Trial(model)

    def similarity(self) -> Similarity:
        """Of the layers' attention, on a few windows."""
        layers, heads = self.trial.view.count, self.trial.view.config.num_attention_heads
        path = self.job.folder.path / "share-similarity.safetensors"
        found = Similarity.from_tensors(load_file(path)) if path.exists() else Similarity.empty(layers, heads)
        windows = self.text.fit[:WINDOWS]
        for index in range(found.windows, len(windows)):
            begun = time.perf_counter()
            generator = torch.Generator().manual_seed(self.job.report["seed"] * 1000 + index)
            seen = self._seen(windows[index])
            outputs = {layer: self.trial.dense[layer].o_proj.weight for layer in seen}
            look(found, seen, outputs, generator)
            found = replace(found, windows=index + 1)
            self.job.folder.save_tensors(path.name, found.tensors())
            told = "similarity of the layers' attention, a window"
            self.job.emit(StepDone(index, len(windows), time.perf_counter() - begun, told))
        return found

    def protected(self) -> list[int]:
        """Layers with KV heads that copy from far back."""
        if "protected" not in self.state:
            view = self.job.view
            found: set[int] = set()
            if count := how_many(self.settings.protect, view.num_layers * view.config.num_key_value_heads):
                scores = copying_scores(view, self.job.device, self.job.report["seed"])
                found = {layer for layer, _ in best(scores, count, list(range(view.num_layers)))}
            self.state["protected"] = sorted(found)
            self.job.folder.save()
        return list(self.state["protected"])

    def candidates(self) -> Candidates:
        """Layers that may take part."""
        return candidates(self.job.view.facts, self.settings, self.protected())

    def chosen(self, similarity: Similarity | None) -> dict[int, int]:
        """The source of every layer that is to share; empty where none may."""
        if self.settings.pairs:
            return named(self.job.view.facts, self.settings.pairs)
        if self.settings.method == "kvsharer":
            return self._kvsharer()
        if self.settings.choose == "blocks":
            return blocks(self.candidates(), self.settings.block)
        return self._search(similarity)

    def fit(self, chosen: Mapping[int, int], similarity: Similarity | None) -> tuple[dict[int, Share], dict[int, Fit]]:
        """Fit the layers that share, in order, on all of the text that isn't held out, and measure.

        Returns:
            How each layer shares, and its fit, if anything is fitted.
        """
        bench = self._bench(self.text.fit, similarity, "fit")
        shares = {layer: bench.share_of(layer, source) for layer, source in sorted(chosen.items())}
        done, losses = self._fits(), self.state.setdefault("losses", {})
        with self.trial.at_work():
            bench.open(shares, chosen.values())
            if "dense" not in losses:
                losses["dense"] = bench.dense()
                bench.trial.share(shares)
                bench.held.changed(min(shares))
                losses["copied"] = bench.loss(min(shares))
                bench.trial.share({})
                bench.held.changed(min(shares))
                self.job.folder.save()
            losses["fitted"] = bench.add_all(shares, done, self._keep)
            shares = bench.shares()
            self.job.folder.save()
        bench.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        return shares, bench.fits

    def times(self, shares: Mapping[int, Share], fits: Mapping[int, Fit]) -> dict[str, Any]:
        """What a token takes, with and without sharing; see :func:`compress.share.timing.decode_times`."""
        if "decode" not in self.state:
            fitted = {layer: found.fitted for layer, found in fits.items()}
            self.state["decode"] = decode_times(self.trial, shares, fitted, self.text.held.shape[1])
            self.job.folder.save()
        return dict(self.state["decode"])

    def apply(self, shares: Mapping[int, Share], fits: Mapping[int, Fit]) -> None:
        """Let the model share for good."""
        share_layers(self.model, shares)
        for layer, found in fits.items():
            put(self.trial.attention(layer), found.fitted)

    def _seen(self, ids: Tensor) -> dict[int, Seen]:
        """Attention of one window in all layers without sliding windows, on the CPU."""
        found: dict[int, Seen] = {}

        def tap(seen: Seen) -> Tensor:
            if seen.layer in self.trial.view.full:
                query, key, value = (part.float().cpu() for part in (seen.query, seen.key, seen.value))
                found[seen.layer] = replace(seen, query=query, key=key, value=value)
            return seen.attend()

        with self.trial.at_work():
            hidden = self.trial.view.embed(ids)
            positions = self.trial.view.positions(hidden)
            for index in range(self.trial.view.count):
                hidden = self.trial.view.run(index, hidden, positions, tap)
        return found

    def _bench(self, fit: Tensor, similarity: Similarity | None, name: str) -> Workbench:
        return Workbench(self.trial, Text(self.text.held, fit), self.settings, similarity, self.scratch / name)

    def _search(self, similarity: Similarity | None) -> dict[int, int]:
        found = self.candidates()
        state = State.from_json(self.state["search"]) if "search" in self.state else State()
        if not state.ended:
            bench = self._bench(self.text.fit[: self.settings.search_windows], similarity, "search")
            begun = time.perf_counter()

            def keep(now: State) -> None:
                nonlocal begun
                known = self.state.get("search", {"measured": []})
                self.state["search"] = now.to_json()
                self.job.folder.save()
                if len(known["measured"]) < len(now.measured):
                    self._tell(_told(now.measured[-1], now.dense), begun)
                elif len(known.get("chosen", [])) < len(now.chosen):
                    self.job.emit(Message(_added(now)))
                begun = time.perf_counter()

            with self.trial.at_work():
                bench.open(found.consumers, found.layers)
                if state.chosen:
                    bench.add_all({layer: bench.share_of(layer, source) for layer, source in state.chosen})
                search(bench, found, self.settings.budget, state, keep)
            bench.close()
        return dict(state.chosen)

    def _kvsharer(self) -> dict[int, int]:
        if "tried" not in self.state:
            ids = kvsharer.sequences(self.text.fit)
            found = self.candidates()
            begun = time.perf_counter()

            def tell(one: kvsharer.Tried) -> None:
                nonlocal begun
                told = f"layer {one.layer} with keys and values of {one.source}: cosine {one.cosine:.4f}"
                self._tell(told if one.added else f"{told}, left out", begun)
                begun = time.perf_counter()

            with self.trial.at_work():
                apart = kvsharer.distances(self.trial, ids)
                course = Course(self.trial, ids, self.scratch / "sequences", found.layers)
                order = (apart, self.settings.order == "dissimilar")
                _, tried = kvsharer.choose(self.trial, course, found, order, self.settings.threshold, tell)
                course.close()
            self.state["distances"] = apart.tolist()
            self.state["tried"] = [asdict(one) for one in tried]
            self.job.folder.save()
        return {one["layer"]: one["source"] for one in self.state["tried"] if one["added"]}

    def _fits(self) -> dict[int, Fit]:
        """Fits that an earlier attempt has finished."""
        found = {}
        for layer, (before, after, scores) in self.state.get("fits", {}).items():
            kept = load_file(self.job.folder.path / _fit_file(int(layer)))
            scores = None if scores is None else (TypeAdapter(Residual).validate_python(scores[0]), *scores[1:])
            found[int(layer)] = Fit(Fitted(kept["output"], kept.get("value")), before, after, scores)
        return found

    def _keep(self, layer: int, found: Fit) -> None:
        self.job.folder.save_tensors(_fit_file(layer), found.fitted.tensors())
        scores = None if found.scores is None else [asdict(found.scores[0]), *found.scores[1:]]
        self.state.setdefault("fits", {})[str(layer)] = [found.before, found.after, scores]
        self.job.folder.save()
        told = f"layer {layer} fitted: relative output error {found.before:.4f} -> {found.after:.4f}"
        if found.scores is not None:
            told += f", scores {found.scores[1]:.4f} -> {found.scores[2]:.4f}"
        self.job.emit(Message(f"share: {told}"))

    def _tell(self, told: str, begun: float) -> None:
        self.job.emit(Message(f"share: {told}  {time.perf_counter() - begun:.1f} s"))


def _fit_file(layer: int) -> str:
    return f"share-fit-{layer:05d}.safetensors"


def _told(one: Measured, dense: float) -> str:
    grown = math.expm1(one.nll - dense)
    return f"layer {one.layer} with layer {one.source}, beside {one.shared}: perplexity {grown:+.2%}"


def _added(state: State) -> str:
    layer, source = state.chosen[-1]
    grown = math.expm1(state.reached - state.dense)
    return f"share: layer {layer} takes from layer {source}; {len(state.chosen)} layers, perplexity {grown:+.2%}"
