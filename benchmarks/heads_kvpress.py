"""Scores of heads as kvpress takes them, for `heads_ranking.py`; runs in an environment of its own, without compress.

kvpress's `duo_attention_on_the_fly` draws chapters of BookSum from the Hub. It is called as it is, with the texts that
are given here in their place.

    PYTHON benchmarks/heads_kvpress.py MODEL_FOLDER TEXTS.json SCORES.json
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from kvpress.presses import duo_attention_press
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


def main(folder: str, texts: str, out: str) -> None:
    chapters = json.loads(Path(texts).read_text(encoding="utf-8"))
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_dict({"chapter": chapters})
    with patch.object(duo_attention_press, "load_dataset", lambda *args, **kwargs: data):
        scores = duo_attention_press.duo_attention_on_the_fly(model, num_samples=len(chapters))
    Path(out).write_text(json.dumps(scores.tolist()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
