"""``compress generate``: answers as they come, and prompts that are refused before the model is loaded."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.cli.main import main
from runs import quick, refused

from compress.generation import Piece, Sampling, Task, complete
from compress.options import GenerateOptions
from compress.runtime import Unloaded, generate, load

Tiny = Callable[[str], Path]


def test_text_is_printed_as_it_comes(tiny: Tiny) -> None:
    options = GenerateOptions(max_new_tokens=12, temperature=1.0, seed=2)
    pieces = list(generate(str(tiny("llama")), "in a hen", options))
    assert len(pieces) > 4
    arguments = ["generate", str(tiny("llama")), "-p", "in a hen", "--max-new-tokens", "12", "--temperature", "1"]
    assert CliRunner().invoke(main, [*arguments, "--seed", "2"]).stdout == "".join(pieces) + "\n"


def test_sampling_leaves_the_global_generator_alone(tiny: Tiny) -> None:
    state = torch.random.get_rng_state()
    list(generate(str(tiny("llama")), "a", GenerateOptions(max_new_tokens=3, temperature=1.0)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_generation_stops_when_nobody_listens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[None] = []
    real = Unloaded.open

    def counted(self: Unloaded, *args: object, **kwargs: object) -> object:
        model = real(self, *args, **kwargs)  # type: ignore[arg-type]
        model.register_forward_pre_hook(lambda *_: steps.append(None))
        return model

    monkeypatch.setattr(Unloaded, "open", counted)
    answer = generate(str(tiny("llama")), "a", GenerateOptions(max_new_tokens=480, temperature=1.0, chat=False))
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert 0 < len(steps) < 400  # the thread has ended when close() returns


@pytest.mark.parametrize("chat", ["--chat", "--no-chat"])
def test_a_long_prompt_is_refused_before_the_model_is_loaded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, chat: str
) -> None:
    monkeypatch.setattr(Unloaded, "open", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    line = refused("generate", str(tiny("llama")), chat, "--prompt", "z" * 600)
    assert "--prompt: has 6" in line
    assert "the model's context 512" in line
    assert "--device" in refused("generate", str(tiny("llama")), "--prompt", "a", "--device", "cuda:99")


def test_a_packed_artifact_answers_several_at_once(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model, tokenizer = load(quick(tiny("llama"), "rtn", tmp_path / "out", text).out)
    prompt = tuple(tokenizer("in a hen").input_ids)

    def answer(seed: int) -> str:
        pieces: list[Piece] = []
        complete(model, tokenizer, Task(prompt, 32, sampling=Sampling(temperature=1.0, seed=seed)), pieces.append)
        return "".join(piece.text for piece in pieces)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(8)))
    assert together == [answer(seed) for seed in range(8)]
    assert len(set(together)) == 8
