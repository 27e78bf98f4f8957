"""Slopes by beta against finite differences, and the choice of heads."""

import pytest
import torch
from compress.evalsuite.head import evaluating
from models import build_model

from compress.act.choose import choose
from compress.act.gradient import Slopes, calibrating, question_loss, slopes
from compress.act.questions import Question, _item
from compress.heads.layers import Layers
from compress.plan import Calibration

STEP = 4e-3


def question(seed: int = 0) -> Question:
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 300, (40,), generator=draw).tolist()
    answers = [torch.randint(3, 300, (count,), generator=draw).tolist() for count in (4, 7, 2)]
    return Question(tuple(_item([*prompt, *answer], 40) for answer in answers), 1, "made up")


def both(choice: bool) -> tuple[Slopes, torch.Tensor]:
    """Slopes in closed form, and by changing every head's beta a little."""
    model = build_model("llama").double()
    layers, asked = Layers(model), question()
    with evaluating(model), layers.tapped():
        found = slopes(layers, asked, Calibration(0.4, 2.0, relative=True), choice)
        loss = question_loss(layers, asked, None, choice)[0]
        changes = torch.zeros(3, 2, dtype=torch.float64)
        for layer in range(3):
            for head in range(2):
                for step, weight in ((STEP / 2, 2), (STEP, -1)):  # without the second-order term
                    near = calibrating({layer: [head]}, Calibration(1 - step, 2.0, relative=True))
                    changes[layer, head] += weight * (loss - question_loss(layers, asked, near, choice)[0]) / step
    return found, changes


@pytest.mark.parametrize("choice", [False, True])
def test_slopes_are_finite_differences(choice: bool) -> None:
    found, changes = both(choice)
    assert float(found.by_beta.abs().min()) > 1e-5
    torch.testing.assert_close(found.by_beta, changes, rtol=0.01, atol=1e-7)
    assert bool((found.sinks > 0).all())


def test_a_model_without_sinks_has_no_slopes() -> None:
    model = build_model("llama")
    layers = Layers(model)
    with evaluating(model), layers.tapped():
        found = slopes(layers, question(), Calibration(0.4, 1.0))
    assert not bool(found.by_beta.any())
    assert not bool(found.sinks.any())


def test_a_choice_counts_the_right_answer() -> None:
    model = build_model("llama")
    layers, asked = Layers(model), question()
    with evaluating(model), layers.tapped():
        losses = [question_loss(layers, Question(asked.answers, gold, "x"), None, True) for gold in range(3)]
    assert sum(right for _, right in losses) == 1
    assert min(losses)[1]
    assert sum(float(torch.tensor(-loss).exp()) for loss, _ in losses) == pytest.approx(1)


def test_heads_are_chosen_by_what_is_above_zero_over_questions() -> None:
    noise = torch.randn(50, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[:, 1, 0] += 2  # less of beta is less of the loss
    noise[:, 2, 1] -= 2  # more of it
    noise[:, 3, 1] += 2  # isn't a candidate
    noise[:, 0] = 0  # no sinks
    candidates = [(layer, head) for layer in range(3) for head in range(2)]
    found = choose(noise, candidates, 0.05)
    assert found.heads == ((1, 0),)
    assert float(found.t[1, 0]) > 8
    assert float(found.p[2, 1]) > 0.999
    assert float(found.p[3, 1]) == float(found.p[0, 0]) == 1.0


def test_of_many_heads_few_pass_by_chance() -> None:
    draw = torch.Generator().manual_seed(1)
    candidates = [(layer, head) for layer in range(30) for head in range(3)]
    passed = [len(choose(torch.randn(40, 30, 3, generator=draw), candidates, 0.05).heads) for _ in range(40)]
    assert sum(count > 0 for count in passed) <= 6


def test_equal_slopes_are_beyond_doubt() -> None:
    found = choose(torch.ones(8, 2, 1), [(0, 0), (1, 0)], 0.05)
    assert found.heads == ((0, 0), (1, 0))
