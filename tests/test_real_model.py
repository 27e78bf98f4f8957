"""The main job on the real model that `make setup` fetches: SmolLM2-135M-Instruct, a GGUF file of Q4_1 blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.model import open_model

MODEL = Path(__file__).parents[1] / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not MODEL.exists(), reason="run `make setup` to fetch the model"),
]


def compress(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("compress")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_our_reader_gives_transformers_logits() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32).eval()
    view = open_model(str(MODEL))
    ids = view.tokenizer()("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, ours = theirs(ids).logits, view.load_dense()(ids).logits
    assert torch.equal(ours, expected)
    assert view.tokenizer().decode([int(ours[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
def test_rsq_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    settings = ["weights.bits=4", "weights.sweeps=1", "calibration.samples=4", "calibration.seq_len=256"]
    settings += ["eval.text=pydoc", "eval.window=256", "eval.windows=4"]
    options = [part for setting in settings for part in ("--set", setting)]
    printed = compress(
        *("run", "--model", str(MODEL), "--recipe", "rsq", "--out", str(out), "--calibration", "pydoc", "--offline"),
        *("--json", *options),
    )
    report = json.loads(printed)["report"]
    modules = report["weights"]["modules"]
    assert len(modules) == 30 * 7
    assert all(0 < module["relative_error"] < 0.2 and not module["note"] for module in modules)
    assert report["weights"]["rotation"]["residual"] == "Hadamard 36x16 (Paley II)"
    (row,) = report["eval"]["rows"]
    assert 1.0 < row["ratio"] < 1.25
    assert report["artifact"]["bits_per_weight"] < 9
    answer = compress("generate", str(out), "--prompt", "What is the capital of France?", "--max-new-tokens", "12")
    assert "Paris" in answer
