"""Does token importance help on a model? RSQ's strategies against uniform weights, on one layer's worth of patience.

    python examples/compare_importance.py MODEL TEXT.txt

Prints the perplexity after 3-bit quantization with every strategy, everything else equal.
"""

import sys
import tempfile
from pathlib import Path

import compress
from compress.options import RunOptions

STRATEGIES = ("none", "attention", "act_norm", "token_freq")


def main(model: str, text: str) -> None:
    """Run every strategy and print one line for each."""
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            result = compress.run(
                model,
                {
                    "base": "rsq",
                    "calibration": {"source": text, "samples": 8, "seq_len": 512},
                    "weights": {"importance": strategy},
                    "eval": {"text": "pydoc", "window": 512, "windows": 8},
                },
                out=Path(folder, "artifact"),
                options=RunOptions(seed=0),
            )
        row = result.report["eval"]["rows"][0]
        print(f"{strategy:12} {row['before']:.2f} -> {row['after']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
