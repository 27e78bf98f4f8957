"""A pretrained model, seen layer by layer: its facts from the config alone, its weights one decoder layer at a time."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compress.calibrate.errors import InputError
from compress.checkpoint import Checkpoint, SafetensorsCheckpoint, check_tensors, read_json
from compress.facts import LinearFacts, ModelFacts
from compress.families import Family, check_config, family_of
from compress.gguf_reader import GgufCheckpoint
from compress.share.config import MARK
from compress.source import GGUF_FILE, Source, download, hub_config_folder, hub_weight_bytes, locate

__all__ = ["LinearFacts", "ModelFacts", "ModelView", "open_config", "open_model", "run_layer", "view_of"]

_CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError)


class ModelView:
    """A model whose weights are read layer by layer; everything that is returned is float32 on the CPU.

    Args:
        facts: the model's facts, checked against the checkpoint.
        checkpoint: its weights.
        path: the folder or the ``.gguf`` file.
        trust_remote_code: let the tokenizer run Python code that comes with the model.
    """

    def __init__(self, facts: ModelFacts, checkpoint: Checkpoint, path: Path, trust_remote_code: bool) -> None:
        self.facts = facts
        self.checkpoint = checkpoint
        self.path = path
        self.source = facts.source
        self.config = facts.config
        self.family = facts.family
        self.dtype = facts.dtype
        self.tied = facts.tied
        self.num_layers = facts.num_layers
        self.trust_remote_code = trust_remote_code
        self._run_config = _run_config(facts.config)

    def over(self, facts: ModelFacts, checkpoint: Checkpoint) -> "ModelView":
        """The model with other facts and weights."""
        return type(self)(facts, checkpoint, self.path, self.trust_remote_code)

    def linears(self, layer: int) -> dict[str, LinearFacts]:
        """As :meth:`ModelFacts.linears`."""
        return self.facts.linears(layer)

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        """All parameters of one decoder layer, by names relative to it (``self_attn.q_proj.weight``)."""
        prefix = f"{self.family.layers}.{layer}."
        return {name: self._read(prefix + name) for name in self.facts.shapes(layer)}

    def build_layer(self, layer: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """transformers' decoder layer with these tensors, which are used as they are and not copied.

        Args:
            layer: its index; it decides on a sliding window.
            weights: every parameter of the layer, named as ``layer_weights`` names them.

        Returns:
            The module in eval mode, without gradients, with PyTorch's scaled-dot-product attention.
        """
        with torch.device("meta"):
            module: nn.Module = self.family.load_class("DecoderLayer")(self._run_config, layer)
        self._shape_layer(module, layer)
        module.load_state_dict(dict(weights), strict=True, assign=True)
        return module.requires_grad_(False).eval()

    def rotary(self) -> nn.Module:
        """The model's rotary embedding, with the scaling that its config asks for."""
        module: nn.Module = self.family.load_class("RotaryEmbedding")(self._run_config)
        return module.eval()

    def position_embeddings(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of RoPE for positions 0 to ``seq_len - 1``, each ``[1, seq_len, head_dim]``."""
        positions = torch.arange(seq_len).unsqueeze(0)
        cos, sin = self.rotary()(torch.empty(0), positions)
        return cos, sin

    def window(self, layer: int) -> int | None:
        """As :meth:`ModelFacts.window`."""
        return self.facts.window(layer)

    def attention_mask(self, layer: int, seq_len: int) -> Tensor | None:
        """The mask for full, unpadded sequences.

        Returns:
            None where attention is plainly causal: transformers' sdpa then sets ``is_causal``, which is the fast path.
            For a sliding window shorter than the sequence a boolean ``[1, 1, seq_len, seq_len]``, True = attend.
        """
        window = self.window(layer)
        if window is None or window >= seq_len:
            return None
        position = torch.arange(seq_len)
        distance = position[:, None] - position[None, :]
        return ((distance >= 0) & (distance < window))[None, None]

    def embed_weight(self) -> Tensor:
        """The token embedding, ``[vocab, hidden]``."""
        return self._read(f"{self.family.embed}.weight")

    def final_norm_weight(self) -> Tensor:
        """The weight of the last norm, ``[hidden]``."""
        return self._read(f"{self.family.final_norm}.weight")

    def head_weight(self) -> Tensor:
        """The output head, ``[vocab, hidden]``; the embedding when the two are tied."""
        return self.embed_weight() if self.tied else self._read(f"{self.family.head}.weight")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer with its chat template.

        Raises:
            InputError: its files are missing or damaged, or need ``trust_remote_code``.
        """
        try:
            if self.path.is_file():
                # AutoTokenizer would come to the same class after parsing the whole header twice, 8 s for 135M.
                return PreTrainedTokenizerFast.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
            return AutoTokenizer.from_pretrained(str(self.path), trust_remote_code=self.trust_remote_code)
        except _CONFIG_ERRORS as error:
            problem = f"its tokenizer can't be loaded ({str(error).splitlines()[0]})"
            raise InputError("--model", self.source, problem, fix="add its tokenizer files to the folder") from error

    def generation_config(self) -> GenerationConfig:
        """The model's generation settings; without a file of them, those that the config implies."""
        if (self.path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.path))
        return GenerationConfig.from_model_config(self.config)

    def name(self) -> str:
        """Hub id, folder name, or the name in the GGUF file."""
        return self.facts.name

    def load_dense(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model, uncompressed, as ``from_pretrained`` would give it, in eval mode and without gradients.

        Peak memory is the model plus one tensor: the largest is read first.
        """
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        with torch.device("meta"):
            model: PreTrainedModel = self.family.load_class("ForCausalLM")(config)
        self._shape_model(model)
        shapes = self.facts.tensor_shapes()
        for name in sorted(shapes, key=lambda name: prod(shapes[name]), reverse=True):
            module, _, parameter = name.rpartition(".")
            weight = nn.Parameter(self._read(name, dtype), requires_grad=False)
            setattr(model.get_submodule(module), parameter, weight)
        model.set_submodule(self.family.rotary, self.rotary())
        if self.tied:
            model.get_submodule(self.family.head).weight = model.get_submodule(self.family.embed).weight
        model.generation_config = self.generation_config()
        return model.eval()

    def _shape_layer(self, module: nn.Module, layer: int) -> None:
        """Take away what a layer that shares doesn't have."""

    def _shape_model(self, model: PreTrainedModel) -> None:
        """The same of a whole model."""

    def _read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        if name == f"{self.family.embed}.weight" and name not in self.checkpoint.names():
            name = f"{self.family.head}.weight"  # a tied matrix may be stored under either name
        return self.checkpoint.read(name).to(dtype)


@torch.no_grad()
def run_layer(
    layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """One decoder layer on full sequences without a cache.

    Args:
        layer: from ``ModelView.build_layer``.
        hidden: ``[batch, seq, hidden]``.
        position_embeddings: cosines and sines, each ``[1, seq, head_dim]``.
        mask: from ``ModelView.attention_mask``.

    Returns:
        ``[batch, seq, hidden]``.
    """
    output: Tensor = layer(hidden, attention_mask=mask, position_embeddings=position_embeddings)
    return output


def open_config(source: str) -> ModelFacts:
    """The facts of a model from its config and file headers; no weights are fetched.

    None are read either, but for an output head that is stored beside the embedding it is said to be.

    Raises:
        InputError: no such model, an unsupported family, a damaged file, or weights that don't fit the config.
    """
    found = locate(source)
    if found.path is not None:
        return _open_local(found, found.path)[0]
    return _hub_facts(source, hub_weight_bytes(source))


def open_model(source: str, trust_remote_code: bool = False) -> ModelView:
    """Open a model for reading: a Hub id, a folder with safetensors, or a ``.gguf`` file.

    Args:
        source: the model. On the Hub its config is looked at first, then its files are fetched.
        trust_remote_code: let the tokenizer run Python code that comes with the model. The model itself is always
            run by transformers' own classes.

    Raises:
        InputError: as ``open_config``.
    """
    found = locate(source)
    if found.path is None:
        nbytes = hub_weight_bytes(source)
        _hub_facts(source, nbytes)
        path = download(source, online=nbytes is not None)
        if not list(path.glob("*.safetensors")) and (path / GGUF_FILE).is_file():
            path = path / GGUF_FILE
    else:
        path = found.path
    facts, checkpoint = _open_local(found, path)
    return ModelView(facts, checkpoint, path, trust_remote_code)


def view_of(config: PreTrainedConfig, checkpoint: Checkpoint, path: Path) -> ModelView:
    """A model whose tensors another reader gives, as of a quantized one; InputError if the family isn't supported."""
    facts = _facts(str(path), path.name, config, family_of(config.to_dict(), str(path)))
    return ModelView(facts, checkpoint, path, trust_remote_code=False)


def _hub_facts(repo: str, nbytes: int | None) -> ModelFacts:
    family, config = _folder_config(hub_config_folder(repo, online=nbytes is not None), repo)
    facts = _facts(repo, repo, config, family)
    return replace(facts, checkpoint_bytes=facts.num_params * facts.dtype.itemsize if nbytes is None else nbytes)


def _open_local(found: Source, path: Path) -> tuple[ModelFacts, Checkpoint]:
    checkpoint: Checkpoint
    if path.is_file():
        checkpoint = GgufCheckpoint(path, found.text)
        family = checkpoint.family
        content = checkpoint.config()
        check_config(content, family, found.text)
        try:
            config = CONFIG_MAPPING[family.name].from_dict(content)
        except _CONFIG_ERRORS as error:
            raise _config_error(found.text, error) from error
        name = checkpoint.header.metadata.get("general.name", path.stem)
    else:
        family, config = _folder_config(path, found.text)
        checkpoint = safetensors = SafetensorsCheckpoint(path, found.text)
        if config.tie_word_embeddings and safetensors.differ(f"{family.head}.weight", f"{family.embed}.weight"):
            config.tie_word_embeddings = False  # transformers believes the weights rather than the config, and so do we
        name = found.text if found.kind == "hub" else path.resolve().name
    facts = _facts(found.text, name, config, family)
    expected = facts.tensor_shapes()
    stored = set(checkpoint.names())
    head, embed = f"{family.head}.weight", f"{family.embed}.weight"
    if facts.tied and head in stored and embed not in stored:
        expected[head] = expected.pop(embed)
    check_tensors(checkpoint, expected, found.text)
    weights = [file for file in checkpoint.files() if file.suffix in (".safetensors", ".gguf")]
    nbytes = sum(file.stat().st_size for file in weights)
    return replace(facts, dtype=checkpoint.storage_dtype(), checkpoint_bytes=nbytes), checkpoint


def _folder_config(folder: Path, source: str) -> tuple[Family, PreTrainedConfig]:
    content = read_json(folder / "config.json", source)
    if MARK in content:
        problem, fix = "its layers share attention already, and it can't be compressed again", "give the original model"
        raise InputError("--model", source, problem, fix=fix)
    family = family_of(content, source)
    check_config(content, family, source)
    try:
        return family, AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except _CONFIG_ERRORS as error:
        raise _config_error(source, error) from error


def _config_error(source: str, error: BaseException) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError("--model", source, f"its config isn't valid ({type(error).__name__}: {reason})")


def _facts(source: str, name: str, config: PreTrainedConfig, family: Family) -> ModelFacts:
    try:
        with torch.device("meta"):
            layer = family.load_class("DecoderLayer")(_run_config(config), 0)
            family.load_class("RotaryEmbedding")(config)  # an unknown rope_type is found here
    except _CONFIG_ERRORS as error:
        raise _config_error(source, error) from error
    shapes = {key: tuple(value.shape) for key, value in layer.named_parameters()}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tied = bool(config.tie_word_embeddings)
    return ModelFacts(source, name, config, family, dtype, tied, MappingProxyType(shapes), 0)


def _run_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy for the layers we run: which attention they use is our business, not part of the model's config."""
    run = copy.deepcopy(config)
    run._attn_implementation = "sdpa"
    return run
