"""A server over an artifact whose layers share attention."""

from pathlib import Path
from random import Random

import httpx2
import pytest
import torch
from models import build_tokenizer, save_tiny
from servers import NAME, served

from compress.pipeline import run
from compress.runtime import load
from compress.serving import Settings, create_app


def test_a_server_answers_as_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.report_page.render", lambda report, title: "")
    (tmp_path / "text.txt").write_text(" ".join(Random(0).choices(("one", "two", "three", "the", "of"), k=2000)))
    calibration = {"samples": 4, "seq_len": 144, "source": str(tmp_path / "text.txt")}
    section = {"check_windows": 2, "protect": 0.0, "pairs": [[3, 2]]}
    deep = save_tiny("llama", tmp_path / "deep", num_hidden_layers=6)
    out = run(str(deep), {"name": "test", "calibration": calibration, "share": section}, out=tmp_path / "out").out
    model, _ = load(out)
    tokenizer = build_tokenizer()
    with served(create_app(model, tokenizer, Settings(served_name=NAME))) as url:
        body = {"model": NAME, "prompt": "one two three", "max_tokens": 5, "temperature": 0}
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=30).json()
    ids = tokenizer("one two three", return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer["usage"]["completion_tokens"] == len(expected)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
