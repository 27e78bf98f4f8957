"""The stage ``weights``: from the original checkpoint to quantized layers on disk, one decoder layer at a time.

RSQ is three settings of this stage: ``rotation`` (weights/rotation.py), ``importance`` (calibrate/importance.py) and
the solver (weights/gptq.py). A finished layer leaves its tensors, and the inputs of the next one, in the work folder.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.artifact.compressed_tensors import dequantized, packed_tensors
from compress.calibrate.errors import InputError
from compress.calibrate.stream import ActivationFile
from compress.calibrate.windows import expand
from compress.calibrate.workers import Workers, one_thread
from compress.events import LayerDone, LayerStarted, Message, ModuleDone, StageDone, StageStarted
from compress.job import PROBE_TOKENS, Estimate, Job, Result
from compress.model import ModelFacts, run_layer
from compress.recipe import Recipe
from compress.schema import Weights
from compress.scheme import Scheme
from compress.weights import choices
from compress.weights.gptq import Settings, round_to_nearest
from compress.weights.grid import Grid
from compress.weights.layer import Quantized, Streams, Work, quantize_layer
from compress.weights.observe import Pieces
from compress.weights.rotation import Rotations, describe, make_rotations, rotate_layer, rotate_rows, unties
from compress.weights.tuning import Parts, rms_norm
from compress.weights.tuning_run import Tuned, tune

HEAD_ROWS = 8192  # of the output head, quantized at once


class WeightsStage:
    """Weight quantization, as the section ``weights`` of the recipe describes it."""

    name = "weights"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        choices.check(facts, recipe)

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        return choices.estimate(facts, recipe)

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        with Workers(1 if job.device.type != "cpu" else None) as workers:
            _Run(job, workers).all_layers()


class _Run:
    """The state of one run of the stage."""

    def __init__(self, job: Job, workers: Workers) -> None:
        self.job = job
        self.settings: Weights = _present(job.recipe)
        facts = job.view.facts
        self.dtype = choices.storage_dtype(facts, job.recipe)
        self.group_size = choices.group_size(facts, self.settings)
        with one_thread():  # a random rotation comes from a QR decomposition, see weights/gptq.py
            self.rotations: Rotations = make_rotations(facts, self.settings, job.report["seed"])
        self.untied = unties(facts, self.settings)
        self.head_bits = choices.head_bits(facts, self.settings)
        ids, measured = _tokens(job)
        counts = torch.bincount(ids.flatten(), minlength=facts.config.vocab_size)
        self.work = Work(self.settings, self.group_size, self.dtype, ids, counts, measured, job.device, workers)
        self.state = job.folder.stage("weights")

    def all_layers(self) -> None:
        """Run, or go on, layer by layer; then describe the result."""
        job, total = self.job, self.job.view.num_layers
        started = time.perf_counter()
        job.emit(StageStarted("weights", total))
        if "layers" not in self.state:
            self._ends()
            self.state |= {"layers": 0, "modules": [], "seconds": 0.0}
            job.folder.save()
        elif self.state["layers"]:
            job.emit(Message(f"resumed: {self.state['layers']} of {total} layers are done"))
        scratch = self._scratch()
        for index in range(self.state["layers"], total):
            self._layer(index, total, scratch)
        for file in scratch:
            file.path.unlink(missing_ok=True)
        seconds = time.perf_counter() - started
        tuned = self._tuned()
        job.result = self._result(tuned)
        job.report["weights"] = self._report() | {"tuning": None if tuned is None else tuned.report}
        job.emit(StageDone("weights", seconds))

    def _ends(self) -> None:
        """Embedding, final norm and head: rotated, stored, and the first layer's inputs made from what is stored."""
        view, family = self.job.view, self.job.view.family
        _check_finite(f"{family.final_norm}.weight", gain := view.final_norm_weight(), view.source)
        _check_finite(f"{family.embed}.weight", embed := view.embed_weight(), view.source)
        if not view.tied or self.untied:
            _check_finite(f"{family.head}.weight", head := view.head_weight(), view.source)
            head = rotate_rows(head, self.rotations, gain)
            self.job.folder.save_tensors("head.safetensors", self._head(head))
            del head
        embed = rotate_rows(embed, self.rotations).to(self.dtype)
        if not torch.isfinite(embed).all():
            fix = "set export.dtype=bfloat16 or float32"
            raise InputError("export.dtype", self.dtype, "is too narrow for the embedding's values", fix=fix)
        self.job.folder.save_tensors("embed.safetensors", {f"{family.embed}.weight": embed})
        norm = torch.ones_like(gain) if self.rotations.residual is not None else gain
        self.job.folder.save_tensors("norm.safetensors", {f"{family.final_norm}.weight": norm.to(self.dtype)})
        hidden = self._hidden(0)
        for sample, ids in enumerate(self.work.ids):
            hidden[sample] = embed[ids]
        hidden.flush()

    def _head(self, head: Tensor) -> dict[str, Tensor]:
        name = self.job.view.family.head
        if self.head_bits == 16:
            return {f"{name}.weight": head.to(self.dtype)}
        scheme = self._head_scheme()
        columns = head.shape[1]
        grid = Grid(scheme.bits, symmetric=True, dtype=self.dtype)
        settings = Settings(grid, columns if scheme.group_size == -1 else scheme.group_size, clip="none")
        parts = [round_to_nearest(rows, settings) for rows in head.split(HEAD_ROWS)]
        return packed_tensors(
            name,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales.scale for part in parts]),
            torch.cat([part.scales.zero for part in parts]),
            scheme,
            self.dtype,
        )

    def _head_scheme(self) -> Scheme:
        return Scheme(8, self.group_size, symmetric=True)

    def _layer(self, index: int, total: int, scratch: tuple[ActivationFile, ActivationFile]) -> None:
        job, view = self.job, self.job.view
        started = time.perf_counter()
        job.emit(LayerStarted(index, total))
        weights = view.layer_weights(index)
        for name, weight in weights.items():
            _check_finite(f"{view.family.layers}.{index}.{name}", weight, view.source)
        weights = rotate_layer(weights, view.family, self.rotations)
        linear = {f"{module}.weight" for module in view.family.roles.values()}
        # what isn't quantized takes part as it will be stored
        weights = {name: w if name in linear else w.to(self.dtype).float() for name, w in weights.items()}
        layer = view.build_layer(index, weights).to(job.device)
        length = self.work.ids.shape[1]
        cos, sin = view.position_embeddings(length)
        mask = view.attention_mask(index, length)
        pieces = Pieces(
            layer,
            view.family,
            (cos.to(job.device), sin.to(job.device)),
            None if mask is None else mask.to(job.device),
        )
        if not self._hidden_path(index).exists():
            fix = "start over with --fresh"
            raise InputError("--resume", self._hidden_path(index), "is missing: it held this layer's inputs", fix=fix)
        inputs, outputs = self._hidden(index), self._hidden(index + 1)
        names = {role: fact.name for role, fact in view.linears(index).items()}
        streams = Streams(inputs, outputs, *scratch)
        done = quantize_layer(pieces, streams, self.work, names, view.window(index), self._lead(index))
        if not all(bool(torch.isfinite(outputs[i]).all()) for i in range(len(outputs))):
            raise InputError(
                "--model", view.source, f"layer {index} gives NaN or infinite activations on the calibration text"
            )
        self._store(index, done, {name: w for name, w in weights.items() if name not in linear})
        outputs.flush()
        self.state["layers"] = index + 1
        self.state["modules"] += [_line(part, self.group_size) for part in done]
        self.state["seconds"] += time.perf_counter() - started
        job.folder.save()
        self._forget(index)
        for part in done:
            job.emit(_event(part, self.group_size))
        job.emit(LayerDone(index, total, time.perf_counter() - started))

    def _lead(self, index: int) -> Callable[[int], None] | None:
        """What lets the layer that a layer takes from, quantized as it is, attend to a sample."""
        view, share = self.job.view, self.job.view.facts.shares.get(index)
        if share is None:
            return None
        layer = self._built(self._parts(), share.source).to(self.job.device)
        positions = tuple(table.to(self.job.device) for table in view.position_embeddings(self.work.ids.shape[1]))
        pieces, inputs = Pieces(layer, view.family, (positions[0], positions[1]), None), self._hidden(share.source)

        def lead(sample: int) -> None:
            pieces.look(pieces.attention_input(inputs[sample].to(self.job.device)), lambda *_: None)

        return lead

    def _forget(self, index: int) -> None:
        """The inputs of a finished layer, but where another one will take its attention."""
        last: dict[int, int] = {}
        for layer, share in self.job.view.facts.shares.items():
            last[share.source] = max(layer, last.get(share.source, 0))
        for done in (index, *(source for source, layer in last.items() if layer == index)):
            if last.get(done, index) <= index:
                self._hidden_path(done).unlink()

    def _store(self, index: int, done: list[Quantized], rest: dict[str, Tensor]) -> None:
        prefix = f"{self.job.view.family.layers}.{index}."
        tensors = {prefix + name: tensor.to(self.dtype) for name, tensor in rest.items()}
        for part in done:
            scales = part.solution.scales
            scheme = self._scheme(part.bits)
            tensors |= packed_tensors(part.name, part.solution.codes, scales.scale, scales.zero, scheme, self.dtype)
        self.job.folder.save_tensors(_layer_file(index), tensors)

    def _scheme(self, bits: int) -> Scheme:
        return Scheme(bits, self.group_size, self.settings.symmetric)

    def _hidden(self, index: int) -> ActivationFile:
        samples, length = self.work.ids.shape
        shape = (samples, length, self.job.view.config.hidden_size)
        return ActivationFile(self._hidden_path(index), shape)

    def _hidden_path(self, index: int) -> Path:
        return self.job.folder.path / f"hidden-{index:05d}.bin"

    def _scratch(self) -> tuple[ActivationFile, ActivationFile]:
        samples, length = self.work.ids.shape
        linears = self.job.view.linears(0)
        widths = {"attention": linears["o"].in_features, "mlp": linears["down"].in_features}
        attention, mlp = (
            ActivationFile(self.job.folder.path / f"{name}.bin", (samples, length, width))
            for name, width in widths.items()
        )
        return attention, mlp

    def _tuned(self) -> Tuned | None:
        """The layers after end-to-end tuning, if the recipe asks for it."""
        section, text = self.job.recipe.calibration, self.job.calibration
        if not self.settings.tune_epochs or section is None or text is None:
            return None
        return tune(self.job, self.settings, self._parts(), text.ids, self.work.workers)

    def _parts(self) -> Parts:
        """The files that the layers' passes left."""
        view, folder = self.job.view, self.job.folder.path
        own_head = not view.tied or self.untied
        return Parts(
            layers=[folder / _layer_file(index) for index in range(view.num_layers)],
            embed=folder / "embed.safetensors",
            norm=folder / "norm.safetensors",
            head=folder / ("head.safetensors" if own_head else "embed.safetensors"),
            bits={name: scheme.bits for name, scheme in self._schemes().items()},
        )

    def _schemes(self) -> dict[str, Scheme]:
        schemes = {module["name"]: self._scheme(module["bits"]) for module in self.state["modules"]}
        if self.head_bits == 8:
            schemes[self.job.view.family.head] = self._head_scheme()
        return schemes

    def _result(self, tuned: Tuned | None) -> Result:
        parts = self._parts()
        hidden = self._hidden(self.job.view.num_layers)[0][:PROBE_TOKENS]
        if tuned is not None and tuned.parts != parts:
            parts = tuned.parts
            hidden = self._last_hidden(parts)
        return Result(
            parts=[parts.embed, *parts.layers, parts.norm, *([parts.head] if parts.head != parts.embed else [])],
            schemes=self._schemes(),
            untied=self.untied,
            dtype=self.dtype,
            probe=self.work.ids[0, :PROBE_TOKENS].clone(),
            logits=self._logits(hidden, parts),
        )

    def _last_hidden(self, parts: Parts) -> Tensor:
        """The probe's residual stream ``[tokens, hidden]`` after the layers of some files."""
        view = self.job.view
        ids = self.work.ids[0, :PROBE_TOKENS]
        hidden = load_file(parts.embed)[f"{view.family.embed}.weight"][ids].float().unsqueeze(0)
        positions = view.position_embeddings(len(ids))
        for index in range(view.num_layers):
            hidden = run_layer(self._built(parts, index), hidden, positions, view.attention_mask(index, len(ids)))
        return hidden[0]

    def _built(self, parts: Parts, index: int) -> nn.Module:
        """A layer with what its file stands for."""
        view = self.job.view
        tensors, prefix = load_file(parts.layers[index]), f"{view.family.layers}.{index}."
        weights = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if ".weight_" not in name}
        for name in (name for name in parts.bits if name.startswith(prefix)):
            weights[f"{name.removeprefix(prefix)}.weight"] = dequantized(tensors, name, parts.bits[name])
        return view.build_layer(index, weights)

    def _logits(self, hidden: Tensor, parts: Parts) -> Tensor:
        """The quantized model's answer to the probe: the last hidden states, final norm, head."""
        view = self.job.view
        gain = load_file(parts.norm)[f"{view.family.final_norm}.weight"].double()
        normed = rms_norm(hidden.double(), gain, view.config.rms_norm_eps)
        return normed.float() @ parts.head_weight(view.family.head).t()

    def _report(self) -> dict[str, Any]:
        residual, heads = describe(self.job.view.facts, self.settings)
        modules = self.state["modules"]
        return {
            "group_size": self.group_size,
            "rotation": {"residual": residual, "heads": heads, "seed": self.job.report["seed"]},
            "untied": self.untied,
            "lm_head_bits": self.head_bits,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seconds": round(self.state["seconds"], 2),
            "degraded": [module["name"] for module in modules if module["degraded"]],
            "modules": modules,
        }


def _present(recipe: Recipe) -> Weights:
    assert recipe.weights is not None  # the pipeline runs a stage only if its section is there
    return recipe.weights


def _tokens(job: Job) -> tuple[Tensor, bool]:
    """Calibration windows, expanded; without calibration one window of random tokens, for the reload check alone."""
    if job.calibration is not None and job.recipe.calibration is not None:
        return expand(job.calibration.ids, job.recipe.calibration.expansion), True
    generator = torch.Generator().manual_seed(job.report["seed"])
    return torch.randint(job.view.config.vocab_size, (1, PROBE_TOKENS), generator=generator), False


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _check_finite(name: str, weight: Tensor, source: str) -> None:
    if not torch.isfinite(weight).all():
        raise InputError("--model", source, f"{name} holds NaN or infinite values", fix="the checkpoint is damaged")


def _line(part: Quantized, group_size: int) -> dict[str, Any]:
    """One module of the report; figures that don't exist are null."""
    return {key: None if value != value else value for key, value in asdict(_event(part, group_size)).items()}


def _event(part: Quantized, group_size: int) -> ModuleDone:
    solution = part.solution
    return ModuleDone(
        part.name,
        part.bits,
        group_size,
        part.relative_error,
        solution.damp,
        round(part.seconds, 3),
        solution.note,
        solution.degraded,
    )
