"""Decoding an artifact against the dense model in transformers, and against llama.cpp where it can be called.

Every model lives in a process of its own with one thread; they take turns round by round, so that what else the machine
does slows all of them. Resident memory is what the process holds after answering, less what it held with the libraries
loaded and before the model was.

    python benchmarks/decode.py --dense MODEL [--int8] [--llama-python PYTHON --gguf FILE] NAME=ARTIFACT ...
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PROMPT, FURTHER, LONG = 32, 64, 512


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def answers(generate: Callable[[int, int], None]) -> dict[str, float]:
    """Seconds a token, without the prompt's share, and seconds to the first token of a long prompt."""

    def seconds(prompt: int, new: int) -> float:
        start = time.perf_counter()
        generate(prompt, new)
        return time.perf_counter() - start

    first = seconds(PROMPT, 1)
    return {"token": (seconds(PROMPT, FURTHER + 1) - first) / FURTHER, "first": seconds(LONG, 1)}


def serve_transformers(model: str, packed: bool, activations: str) -> None:
    """Load as ``compress.load`` does and answer every line of the input with a line of figures."""
    import torch
    from compress.evalsuite.efficiency import HighWater

    from compress.runtime import Compute, find

    torch.set_num_threads(1)
    before, cpu = resident(), torch.device("cpu")
    found = find(model)
    water = HighWater(cpu)
    water.reset()
    loaded = found.open(Compute(activations=activations), cpu, packed)  # type: ignore[arg-type]
    loading = water.peak()
    loaded.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, loaded.config.vocab_size, (1, LONG), generator=generator)

    def generate(prompt: int, new: int) -> None:
        given = ids[:, :prompt]
        loaded.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False)

    serve(generate, before, {"loading": loading})


def serve_llama(file: str) -> None:
    """The same with llama.cpp."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    before = resident()
    loaded = Llama(file, n_ctx=2 * LONG, n_batch=LONG, n_threads=1, n_threads_batch=1, verbose=False)
    ids = [(7919 * number) % 40000 + 3 for number in range(LONG)]

    def generate(prompt: int, new: int) -> None:
        loaded.reset()
        loaded.eval(ids[:prompt])
        for _ in range(new - 1):
            loaded.eval([loaded.sample(temp=0.0)])

    serve(generate, before, {})


def serve(generate: Callable[[int, int], None], before: int, facts: dict[str, Any]) -> None:
    generate(PROMPT, 4)
    for line in sys.stdin:
        if not line.strip():
            return
        print(json.dumps(answers(generate) | {"resident": resident() - before} | facts), flush=True)


class Side:
    """One model in a process of its own."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rounds: list[dict[str, float]] = []

    def turn(self) -> None:
        """One round's answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        self.rounds.append(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def table(sides: list[Side]) -> list[str]:
    """Medians, and medians of the rounds' ratios to the first side."""
    base = sides[0]
    lines = ["| | ms/token | tokens/s | x dense | ms to first of 512 | x dense | resident MB | x dense |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for side in sides:
        token, first = ([row[key] for row in side.rounds] for key in ("token", "first"))
        pairs = list(zip(base.rounds, side.rounds, strict=True))
        faster = median(dense["token"] / own["token"] for dense, own in pairs)
        later = median(own["first"] / dense["first"] for dense, own in pairs)
        held, base_held = (one.rounds[-1]["resident"] for one in (side, base))
        lines.append(
            f"| {side.name} | {median(token) * 1e3:.1f} | {1 / median(token):.1f} | {faster:.2f} | "
            f"{median(first) * 1e3:.0f} | {later:.2f} | {held / 1e6:.0f} | {held / base_held:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", metavar="NAME=ARTIFACT")
    parser.add_argument("--dense", required=True, help="the original")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="each artifact with 8-bit activations too")
    parser.add_argument("--llama-python", help="a Python that can import llama_cpp")
    parser.add_argument("--gguf", help="the file for llama.cpp")
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "MODEL", "ACTIVATIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, model, activations = options.serve
        serve_llama(model) if kind == "llama" else serve_transformers(model, kind == "packed", activations)
        return
    own = [str(Path(__file__).resolve()), "--dense", options.dense, "--serve"]
    sides = [Side("dense", [sys.executable, *own, "dense", options.dense, "float"])]
    for entry in options.artifacts:
        name, _, path = entry.partition("=")
        for activations in ("float", "int8") if options.int8 else ("float",):
            label = name if activations == "float" else f"{name} int8"
            sides.append(Side(label, [sys.executable, *own, "packed", path, activations]))
    if options.llama_python:
        sides.append(Side("llama.cpp", [options.llama_python, *own, "llama", options.gguf, "float"]))
    for _ in range(options.rounds):
        for side in sides:
            side.turn()
    for side in sides:
        side.close()
    print("\n".join(table(sides)))
    for side in sides[1:]:
        if side.rounds[0].get("loading"):
            print(
                f"{side.name}: peak while loading {side.rounds[0]['loading'] / 1e6:.0f} MB over libraries and tokenizer"
            )


if __name__ == "__main__":
    main()
