"""GGUF files: weights and logits read back through transformers' loader, tokenizers through its own and ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.calibrate.errors import InputError
from gguf import GGUFReader
from models import CHAT_TEMPLATE, build_tokenizer, save_tiny, save_tiny_gguf
from runs import decoded, distance, logits, quick, rebuilt
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.artifact.gguf import context_length, rope_factors
from compress.artifact.gguf_tokenizer import tokenizer_metadata
from compress.gguf_header import read_strings
from compress.gguf_reader import GgufCheckpoint
from compress.model import open_model
from compress.runtime import load

pytestmark = pytest.mark.usefixtures("_no_page")
Tiny = Callable[[str], Path]
BOTH = ("export.formats=[compressed-tensors, gguf]", "weights.group_size=32")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
# transformers 5.23 drops llama's biases and takes 128 for the width of Qwen3's heads; see its GGUF_CONFIG_MAPPING
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_untied": {**WIDE, "attention_bias": False, "mlp_bias": False},
    "mistral": {**WIDE, "head_dim": 32},
    "qwen2": WIDE,
    "qwen3": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
}
TEXT = "the hen in a 123 <|im_start|>user\nhé, I've don't  x<|im_end|>"


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("llama", ("weights.bits=4", "weights.rotation=hadamard")),
        ("llama", ("weights.bits=8", "weights.overrides={'down_proj': 4}")),
        ("llama_untied", ("weights.bits=4", "weights.lm_head_bits=8")),
        ("mistral", ("weights.bits=4", "weights.rotation=hadamard", "weights.lm_head_bits=8")),
        ("qwen2", ("weights.bits=4", "weights.rotation=random")),
        ("qwen3", ("weights.bits=8", "weights.rotation=hadamard")),
    ],
)
def test_transformers_reads_a_model_with_equal_logits(
    tmp_path: Path, text: Path, name: str, sets: tuple[str, ...]
) -> None:
    save_tiny(name, tmp_path / "model", **SHAPES[name])  # a folder called mistral would be read as another class
    out = quick(tmp_path / "model", "rtn", tmp_path / "out", text, *BOTH, *sets).out
    theirs = AutoModelForCausalLM.from_pretrained(out / "gguf", gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = rebuilt(out)
    ids = torch.arange(8).unsqueeze(0) * 31  # within the sliding windows, which llama.cpp doesn't have
    with torch.no_grad():
        assert distance(theirs(ids).logits, expected(ids).logits) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(out / "gguf", gguf_file="model.gguf")
    assert tokenizer(TEXT).input_ids == build_tokenizer()(TEXT).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_every_weight_and_bias_is_in_the_file(tmp_path: Path, text: Path) -> None:
    save_tiny("llama_untied", tmp_path / "model", **WIDE)
    sets = ("weights.bits=4", "weights.rotation=hadamard", "weights.lm_head_bits=8")
    out = quick(tmp_path / "model", "rtn", tmp_path / "out", text, *BOTH, *sets).out
    expected, checkpoint = decoded(out), GgufCheckpoint(out / "gguf" / "model.gguf", "it")
    assert set(checkpoint.names()) == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(checkpoint.read(key), tensor), key
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out / "gguf" / "model.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "F16"
    assert {kind for tensor, kind in kinds.items() if tensor.endswith(("norm.weight", "bias"))} == {"F32"}


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_scaled_rope(tmp_path: Path, text: Path, scaling: str) -> None:
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    save_tiny("llama", tmp_path / "model", rope_parameters=rope, max_position_embeddings=16384)
    out = quick(tmp_path / "model", "rtn", tmp_path / "out", text, *BOTH).out
    assert distance(logits(load(out / "gguf" / "model.gguf")[0]), logits(rebuilt(out))) < 1e-5
    facts = open_model(str(tmp_path / "model")).facts
    factors = rope_factors(facts)
    if scaling == "linear":
        assert factors is None
        return
    assert factors is not None
    plain = 10000.0 ** -(torch.arange(0, facts.head_dim, 2) / facts.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](facts.config, torch.device("cpu"))
    assert np.allclose(factors, (plain / scaled).numpy(), rtol=1e-5)
    assert factors.max() > 3.9


def test_metadata(tmp_path: Path, text: Path) -> None:
    save_tiny("mistral", tmp_path / "model", **SHAPES["mistral"])
    out = quick(tmp_path / "model", "rtn", tmp_path / "out", text, "weights.group_size=32", "export.formats=gguf").out
    fields = GGUFReader(out / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith(("tokenizer.", "GGUF."))}
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "model",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.vocab_size": 300,
        "llama.context_length": 8,  # the window
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
    }
    assert json.loads((out / "config.json").read_text()).get("quantization_config") is None


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 8), ({"max_window_layers": 3}, 512), ({"sliding_window": 600}, 512)]
)
def test_context_of_layers_with_a_window(tmp_path: Path, changes: dict[str, int], expected: int) -> None:
    save_tiny("qwen2", tmp_path, **changes)
    assert context_length(open_model(str(tmp_path)).facts) == expected


def test_the_tokenizer_of_a_gguf_file_is_taken_over(tmp_path: Path, text: Path) -> None:
    source = save_tiny_gguf("llama", tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "smollm"})
    out = quick(source, "rtn", tmp_path / "out", text, "weights.group_size=32", "export.formats=gguf").out
    before, after = read_strings(source, "tokenizer."), read_strings(out / "model.gguf", "tokenizer.")
    assert before == after
    assert after["tokenizer.ggml.pre"] == "smollm"
    assert len(after["tokenizer.ggml.tokens"]) == 300


SPACE = "\u2581"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(*steps: Any, ignore_merges: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the tests with another way of cutting text."""
    tokenizer = build_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.model.ignore_merges = ignore_merges
    if normalizer is not None:
        backend.normalizer = normalizer
    return tokenizer


def metadata_of(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The metadata of a tiny model with this tokenizer."""
    save_tiny("llama", folder, vocab_size=320)
    tokenizer.save_pretrained(folder)
    view = open_model(str(folder))
    view.tokenizer = lambda: tokenizer  # type: ignore[method-assign]
    return tokenizer_metadata(view)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ((GPT2,), False, "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), GPT2), False, "smollm"),
        ((pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES), False, "qwen2"),
        ((pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES), True, "llama-bpe"),
        ((pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES), False, "smaug-bpe"),
    ],
)
def test_names_of_pre_tokenizers(tmp_path: Path, steps: tuple[Any, ...], ignore_merges: bool, name: str) -> None:
    found = metadata_of(byte_level(*steps, ignore_merges=ignore_merges, normalizer=normalizers.NFC()), tmp_path)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.merges"][0] == "h e"
    assert found["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    assert found["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: byte_level(GPT2, ignore_merges=True), "ignoring merges, which has no name there"),
        (lambda: byte_level(pre_tokenizers.Split(Regex(r"\w+"), "isolated"), BYTES), r"cuts text by \\w\+"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lambda: byte_level(GPT2, normalizer=normalizers.Lowercase()), "normalizes text by Lowercase"),
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0)]))), "it is Unigram, not BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know(
    tmp_path: Path, tokenizer: Callable[[], PreTrainedTokenizerFast], words: str
) -> None:
    with pytest.raises(InputError, match=f"can't be described to llama.cpp.*{words}.*leave gguf out"):
        metadata_of(tokenizer(), tmp_path)


def test_a_tokenizer_that_adds_other_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", None, [("<|im_start|>", 1)]
    )
    with pytest.raises(InputError, match="other tokens than BOS and EOS"):
        metadata_of(tokenizer, tmp_path)


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, as Llama 2 and Mistral have it; a normalizer or Metaspace writes the spaces."""
    merges = [
        (SPACE, "t"),
        ("h", "e"),
        (SPACE + "t", "he"),
        ("i", "n"),
        (SPACE, "a"),
        (SPACE + "a", "n"),
        (SPACE, SPACE),
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [left + right for left, right in merges]
    model = BPE(
        {token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    backend = Tokenizer(model)
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.add_tokens(["<think>"])
    return found


def test_sentencepiece_tokens_are_read_with_equal_ids(tmp_path: Path, text: Path) -> None:
    tokenizer = sentencepiece(prepend=True)
    save_tiny("llama", tmp_path / "model", vocab_size=310)
    tokenizer.save_pretrained(tmp_path / "model")
    out = quick(tmp_path / "model", "rtn", tmp_path / "out", text, *BOTH).out
    theirs = AutoTokenizer.from_pretrained(out / "gguf", gguf_file="model.gguf")
    for words in ("the hen in  an   é a", "hello</s>", "then"):
        assert theirs(words).input_ids == tokenizer(words).input_ids
    stored = read_strings(out / "gguf" / "model.gguf", "tokenizer.ggml.")
    kinds = dict(zip(stored["tokenizer.ggml.tokens"], stored["tokenizer.ggml.token_type"], strict=True))
    wanted = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x0A>": 6, "the": 1, "<think>": 4, "[PAD309]": 5}
    assert {token: kinds.get(token) for token in wanted} == wanted | {"the": None}
    assert stored["tokenizer.ggml.add_bos_token"] is True
    assert stored["tokenizer.ggml.add_eos_token"] is False
    assert stored["tokenizer.ggml.add_space_prefix"] is True


def test_no_space_before_the_text(tmp_path: Path) -> None:
    found = metadata_of(sentencepiece(prepend=False), tmp_path / "plain")
    assert found["tokenizer.ggml.add_space_prefix"] is False
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores[SPACE + "t"] > scores["he"] > scores[SPACE + "the"] > scores["a"]
    lower = sentencepiece(prepend=False)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"changes text by.*Lowercase"):
        metadata_of(lower, tmp_path / "lower")


def test_an_unknown_tokenizer_is_refused_before_any_work(tmp_path: Path, text: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    byte_level(pre_tokenizers.Split(Regex(r"\w+"), "isolated"), BYTES).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"can't be described to llama\.cpp"):
        quick(tmp_path / "model", "rtn", tmp_path / "out", text, *BOTH)
    assert not (tmp_path / "out.partial").exists()
