"""Rotary embeddings whose frequencies depend on the length: no sequence changes another's."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from runs import logits, quick
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.runtime import load
from compress.runtime.rotary import Stateless

SHORT, TRAINED, LONG = 20, 64, 150
SCALINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}


@pytest.fixture(scope="module", params=SCALINGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    length = TRAINED if request.param == "dynamic" else 4 * TRAINED
    changes = {"rope_parameters": SCALINGS[request.param], "max_position_embeddings": length}
    return save_tiny("llama", tmp_path_factory.mktemp(request.param) / "m", **changes)


@pytest.fixture(scope="module", params=["packed", "dense"])
def model(request: pytest.FixtureRequest, folder: Path, text: Path) -> PreTrainedModel:
    if request.param == "dense":
        return load(folder)[0]
    return load(quick(folder, "rtn", folder.parent / "out", text).out)[0]


def cosines(model: PreTrainedModel, length: int) -> Tensor:
    found: Tensor = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])[0]
    return found


def fresh(folder: Path, length: int) -> Tensor:
    """What transformers' own module, never used before, says of a length."""
    return cosines(AutoModelForCausalLM.from_pretrained(folder), length)


def test_every_length_is_as_from_a_fresh_model(model: PreTrainedModel, folder: Path) -> None:
    expected = {length: fresh(folder, length) for length in (SHORT, TRAINED + 9, LONG)}
    assert not torch.equal(expected[LONG][:, :SHORT], expected[SHORT])  # or the test would see nothing
    for length in (LONG, SHORT, TRAINED + 9, LONG, TRAINED + 9):
        assert torch.equal(cosines(model, length), expected[length])
    assert torch.equal(cosines(copy.deepcopy(model), LONG), expected[LONG])


def test_one_answer_after_another(model: PreTrainedModel) -> None:
    expected = logits(model, SHORT)
    logits(model, LONG)
    assert torch.equal(logits(model, SHORT), expected)


def test_two_answers_at_a_time(model: PreTrainedModel) -> None:
    def answer(length: int) -> Tensor:
        ids = torch.arange(length)[None] % 90 + 3
        made: Tensor = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return made

    lengths = [SHORT, LONG, TRAINED - 3, LONG - 7] * 3
    alone = {length: answer(length) for length in set(lengths)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, lengths))
    assert all(torch.equal(made, alone[length]) for made, length in zip(together, lengths, strict=True))


def test_others_keep_their_class(tiny: Callable[[str], Path]) -> None:
    assert not isinstance(load(tiny("llama"))[0].model.rotary_emb, Stateless)
