"""A GGUF file in llama.cpp against the same file in PyTorch: perplexity on the same tokens, and the two tokenizers.

    pip install llama-cpp-python    # compiles for many minutes; CMAKE_ARGS=-DGGML_NATIVE=OFF where AMX isn't allowed
    python benchmarks/gguf_perplexity.py --model OUT/gguf/model.gguf --text TEST.txt

llama.cpp rounds activations to 8 bits where weights are quantized, so the figures agree and aren't equal. Exit code 1
if they differ by more than 1 %.
"""

import math
import sys
from pathlib import Path

import click
import numpy as np
import torch
from compress.evalsuite.perplexity import perplexity

from compress.runtime import load

ALLOWED = 0.01


def theirs(path: Path, ids: list[int], window: int, windows: int, threads: int | None) -> float:
    """Perplexity in llama.cpp over the first windows."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=window, n_batch=window, n_threads=threads, logits_all=True, verbose=False)
    losses = []
    for start in range(0, windows * window, window):
        part = ids[start : start + window]
        model.reset()
        model.eval(part)
        logits = torch.from_numpy(np.array(model.scores[: window - 1], dtype=np.float32))
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(part[1:]))))
        print(f"window {len(losses)}: {math.exp(losses[-1]):.3f}", file=sys.stderr)
    return math.exp(sum(losses) / len(losses))


def equal_tokens(path: Path, text: str, ids: list[int]) -> float:
    """Share of llama.cpp's tokens of a text that are ours too, up to the first piece that is cut differently."""
    from llama_cpp import Llama

    found = Llama(str(path), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=True)
    same = next((i for i, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), len(found))
    return same / len(found)


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", default=1024, show_default=True)
@click.option("--windows", default=8, show_default=True)
@click.option("--threads", type=int, help="Of llama.cpp; by default its own choice.")
def main(model: Path, text: Path, window: int, windows: int, threads: int | None) -> None:
    loaded, tokenizer = load(model)
    content = text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
    windows = min(windows, len(ids) // window)
    ours = perplexity(loaded, ids, window, windows).value
    del loaded
    other = theirs(model, ids.tolist(), window, windows, threads)
    beginning = content[:2000]
    same = equal_tokens(model, beginning, tokenizer(beginning, add_special_tokens=False).input_ids)
    print(f"perplexity@{window} on {windows} windows of {text.name}")
    print(f"  PyTorch   {ours:.4f}")
    print(f"  llama.cpp {other:.4f}  ({other / ours - 1:+.3%})")
    print(f"  tokens that both tokenizers give, until they part: {same:.1%} of {len(beginning)} characters")
    sys.exit(abs(other / ours - 1) > ALLOWED)


if __name__ == "__main__":
    main()
