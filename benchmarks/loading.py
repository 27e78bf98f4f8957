"""Memory while an artifact is loaded packed, and after it: each run in a process of its own.

The peak is the kernel's own record of resident memory (``VmHWM``), begun anew right before ``compress.load``'s work on
the model and after libraries, tokenizer and the family's classes are there; both figures are less what the process held
then. A ratio is to the bytes of the artifact's safetensors files.

    python benchmarks/loading.py [--runs 10] [--threads 2] [--limit 1.3] ARTIFACT ...

Exit code 1 if a run's peak is above the limit.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status() -> dict[str, int]:
    """Bytes by the names that Linux has for them."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def measure(artifact: str, threads: int) -> dict[str, float]:
    """One run, in this process."""
    import torch

    from compress.families import FAMILIES
    from compress.memory import release
    from compress.runtime import Compute, find

    torch.set_num_threads(threads)
    found = find(artifact)
    FAMILIES[json.loads((Path(artifact) / "config.json").read_text())["model_type"]].load_class("ForCausalLM")
    release()
    before = status()
    RESET.write_text("5")
    start = time.perf_counter()
    model = found.open(Compute(), torch.device("cpu"))
    seconds = time.perf_counter() - start
    peak, after = status()["VmHWM"], status()
    assert model is not None
    changed = {kind: after[kind] - before[kind] for kind in ("VmRSS", "RssAnon", "RssFile")}
    return {"peak": peak - before["VmRSS"], "seconds": seconds, **changed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="a folder of packed weights")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch while loading")
    parser.add_argument("--limit", type=float, default=1.3, help="of the peak, as a ratio")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.artifacts[0], options.threads)))
        return
    print("| | artifact MB | peak MB | x artifact | highest | resident MB | x artifact | of it libraries |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    worst = max(report(artifact, options.runs, options.threads) for artifact in options.artifacts)
    if worst > options.limit:
        raise SystemExit(f"a peak of {worst:.3f} x the artifact is above the limit of {options.limit:g}")


def report(artifact: str, runs: int, threads: int) -> float:
    """Print an artifact's row; returns its highest peak as a ratio."""
    size = sum(path.stat().st_size for path in Path(artifact).glob("*.safetensors"))
    command = [sys.executable, __file__, artifact, "--one", "--threads", str(threads)]
    rows = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(runs)]
    peaks, held = sorted(row["peak"] for row in rows), sorted(row["VmRSS"] for row in rows)
    middle, files = runs // 2, max(row["RssFile"] for row in rows)
    print(
        f"| {Path(artifact).name} | {size / 1e6:.1f} | {peaks[0] / 1e6:.1f} to {peaks[-1] / 1e6:.1f} | "
        f"{peaks[middle] / size:.3f} | {peaks[-1] / size:.3f} | {held[0] / 1e6:.1f} to {held[-1] / 1e6:.1f} | "
        f"{held[middle] / size:.3f} | {files / 1e6:.1f} |",
        flush=True,
    )
    return peaks[-1] / size


if __name__ == "__main__":
    main()
