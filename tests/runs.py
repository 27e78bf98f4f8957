"""Short runs of the whole pipeline on tiny models, and artifacts read back without any of our own code."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from compress.cli.main import main
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compress.events import Event
from compress.options import RunOptions
from compress.pipeline import RunResult, run
from compress.recipe import Recipe

QUICK = ("eval=null", "weights.group_size=8", "weights.clip_grid=4")
QUICK_TEXT = ("calibration.samples=2", "calibration.seq_len=32", "weights.sweeps=1")


def options(recipe: str, text: Path, *sets: str, **others: Any) -> RunOptions:
    """The options of a run that takes about half a second; ``sets`` come last and so override them."""
    if recipe == "rtn":
        return RunOptions(set=(*QUICK, *sets), **others)
    return RunOptions(set=(*QUICK, *QUICK_TEXT, *sets), calibration=str(text), **others)


def arguments(model: Path, recipe: str, out: Path, run_options: RunOptions) -> list[str]:
    """The same run on the command line."""
    line = ["run", "--model", str(model), "--recipe", recipe, "--out", str(out)]
    for item in run_options.set:
        line += ["--set", item]
    return line + ([] if run_options.calibration is None else ["--calibration", run_options.calibration])


class Log:
    """An ``on_event`` that keeps what it is told, and fails where ``stop`` says so."""

    def __init__(self, stop: Callable[[Event], bool] = lambda _: False) -> None:
        self.events: list[Event] = []
        self.stop = stop

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.stop(event):
            raise InterruptedRunError

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class InterruptedRunError(Exception):
    """What a test throws into a run; nothing of ours catches it."""


def quick(model: Path, recipe: str, out: Path, text: Path, *sets: str, log: Log | None = None) -> RunResult:
    """A quick run; see :func:`options`."""
    return run(str(model), recipe, out=out, options=options(recipe, text, *sets), on_event=log)


def refused(*arguments: str) -> str:
    """The line that a command prints, with exit code 2, for bad input."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    return result.stderr.splitlines()[-1]


def digest(folder: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """sha256 of the files of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, as they are stored."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def scheme_of(name: str, block: dict[str, Any]) -> dict[str, Any]:
    """The ``weights`` entry of the config group that applies to a module: one that names it wins over ``Linear``."""
    groups = block["config_groups"].values()
    named = [group for group in groups if name in group["targets"]]
    general = [group for group in groups if "Linear" in group["targets"]]
    weights: dict[str, Any] = (named or general)[0]["weights"]
    return weights


def bits_to_codes(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Codes of a little-endian bit stream ``[rows, words]``, bit by bit."""
    stream = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    digits = stream[:, : count * bits].reshape(len(words), count, bits)
    return (digits * (1 << np.arange(bits))).sum(-1)


def decoded(folder: Path) -> dict[str, Tensor]:
    """The dense float32 tensors that an artifact stands for, decoded here from the format's description."""
    tensors = stored(folder)
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = {key: value.float() for key, value in tensors.items() if not re.search(r"\.weight_[a-z_]+$", key)}
    for key in tensors:
        if not key.endswith(".weight_packed"):
            continue
        name = key.removesuffix(".weight_packed")
        bits = scheme_of(name, block)["num_bits"]
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        scale = tensors[f"{name}.weight_scale"].float().numpy()
        codes = bits_to_codes(tensors[key], bits, columns).reshape(rows, scale.shape[1], -1) - 2 ** (bits - 1)
        if (zeros := tensors.get(f"{name}.weight_zero_point")) is not None:
            codes = codes - (bits_to_codes(zeros.t().contiguous(), bits, rows).T - 2 ** (bits - 1))[..., None]
        dense[f"{name}.weight"] = torch.from_numpy((codes * scale[..., None]).astype(np.float32)).view(rows, columns)
    return dense


def rebuilt(folder: Path) -> PreTrainedModel:
    """A dense model of the artifact's config with the tensors of :func:`decoded`."""
    config = AutoConfig.from_pretrained(str(folder))
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(decoded(folder), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 24) -> Tensor:
    """What a model answers to two random sequences."""
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(7))
    return model(ids).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def correlated(
    rows: int, columns: int, samples: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Sequence[Tensor]:
    """A random weight ``[rows, columns]`` and inputs ``[samples, columns]`` whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    mixed = torch.randn(columns, columns, generator=generator, dtype=dtype) * torch.linspace(
        2, 0.05, columns, dtype=dtype
    )
    inputs = torch.randn(samples, columns, generator=generator, dtype=dtype) @ mixed.t()
    return weight, inputs / inputs.std()


def check(result: RunResult) -> dict[str, Any]:
    """Everything that must hold of every artifact; returns its config."""
    out = result.out
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert distance(logits(loaded), logits(rebuilt(out))) < 1e-5
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    assert type(loaded).__name__ == config["architectures"][0]
    assert AutoTokenizer.from_pretrained(out)("in a hen").input_ids
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report, default=str))
    assert report["reload_check"]["weights_identical"]
    assert report["reload_check"]["relative_difference"] < {"float32": 1e-5}.get(report["weights"]["dtype"], 0.05)
    assert Recipe.load(str(out / "recipe.yaml")).model_dump(mode="json") == report["recipe"]
    for module in report["weights"]["modules"]:
        assert scheme_of(module["name"], config["quantization_config"])["num_bits"] == module["bits"]
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert report["artifact"]["weight_bytes"] == nbytes
    assert report["artifact"]["bits_per_weight"] == round(nbytes * 8 / report["model"]["parameters"], 4)
    assert len(result.summary) <= 12
    assert not list(out.parent.glob("*.partial"))
    assert not list(out.parent.glob(".*.lock"))
    return config
