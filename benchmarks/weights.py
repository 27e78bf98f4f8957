"""Weight quantization, method against method, on one model and two text files.

Every row is a ``compress run`` of its own process, so that seconds and peak memory are those of the command, followed
by a perplexity on the same windows. Prints the table of ``docs/results.md``.

    python benchmarks/weights.py --model MODEL --calibration TRAIN.txt --text TEST.txt [--seeds 0,1,2]

For the figures of the documentation, TRAIN.txt is the validation split of WikiText-2 (tokenized form: ``@-@`` and its
like are undone here), TEST.txt the raw test split, and MODEL the file that ``make setup`` fetches.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROWS: dict[str, tuple[str, list[str]]] = {
    "RTN": ("rtn", ["weights.bits=3"]),
    "GPTQ": ("gptq", []),
    "rotated GPTQ": ("rsq", ["weights.importance=none"]),
    "RSQ": ("rsq", []),
    "RSQ W4": ("rsq", ["weights.bits=4"]),
    "RSQ W4, tuned": ("rsq-tuned", []),
}


def natural(text: str) -> str:
    """WikiText's tokenized form as it would be typed."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text.replace("<unk>", "")


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command; seconds and peak memory in MB of its largest process."""
    start = time.perf_counter()
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{' '.join(command)} failed, see {log}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def perplexity(model: str, text: Path, window: int, windows: int) -> float:
    """Perplexity of a model or artifact, by ``compress eval``."""
    command = ["eval", model, "--tasks", "perplexity", "--text", str(text), "--offline", "--json"]
    command += ["--window", str(window), "--windows", str(windows)]
    found = subprocess.run([compress(), *command], capture_output=True, text=True, check=True)
    value: float = json.loads(found.stdout)["scores"]["metrics"][0]["value"]
    return value


def compress() -> str:
    """The command, beside the running Python."""
    return str(Path(sys.executable).with_name("compress"))


@click.command()
@click.option("--model", required=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--seq-len", default=1024, show_default=True)
@click.option("--windows", default=24, show_default=True)
def main(
    model: str, calibration: Path, text: Path, seeds: str, rows: str, samples: int, seq_len: int, windows: int
) -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    train = folder / "train.txt"
    train.write_text(natural(calibration.read_text(encoding="utf-8")), encoding="utf-8")
    log = folder / "log.txt"
    print(f"log: {log}", file=sys.stderr)
    dense = perplexity(model, text, seq_len, windows)
    print("| weights | bits/weight, whole file | perplexity, seed by seed | mean | against dense | seconds | peak MB |")
    print("|---|---:|---|---:|---:|---:|---:|")
    print(f"| dense float32 | | | {dense:.2f} | 1.000 | | |", flush=True)
    for row in rows.split(","):
        recipe, settings = ROWS[row]
        drawn = seeds.split(",") if recipe != "rtn" else ["0"]
        values, seconds, peaks, bits = [], [], [], math.nan
        for seed in drawn:
            out = folder / "artifact"
            command = [compress(), "run", "--model", model, "--recipe", recipe, "--out", str(out), "--offline"]
            command += ["--eval", "none"]
            for setting in settings:
                command += ["--set", setting]
            if recipe != "rtn":
                command += ["--seed", seed, "--calibration", str(train)]
                command += ["--set", f"calibration.samples={samples}", "--set", f"calibration.seq_len={seq_len}"]
            taken, peak = timed(command, log)
            values.append(perplexity(str(out), text, seq_len, windows))
            seconds.append(taken)
            peaks.append(peak)
            bits = json.loads((out / "report.json").read_text())["artifact"]["bits_per_weight"]
            print(f"{row} seed {seed}: {values[-1]:.3f}, {taken:.0f} s, {peak:.0f} MB", file=sys.stderr, flush=True)
            shutil.rmtree(out)
        mean = statistics.mean(values)
        each = ", ".join(f"{value:.2f}" for value in values)
        print(
            f"| {row} | {bits:.2f} | {each} | {mean:.2f} | {mean / dense:.3f} | {statistics.median(seconds):.0f} | "
            f"{max(peaks):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
