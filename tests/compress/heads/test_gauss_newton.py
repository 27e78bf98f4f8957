"""The Gauss-Newton score against the loss itself, at gates that are a little closed."""

import pytest
import torch
from models import build_model

from compress.heads.data import Item
from compress.heads.duo import Settings, Streams
from compress.heads.gauss_newton import gauss_newton
from compress.heads.layers import Layers


@pytest.mark.parametrize("teacher_forced", [True, False])
def test_it_is_the_curvature_of_the_loss(teacher_forced: bool) -> None:
    """Close to open gates the loss of closing one head is s_i (1 - alpha_i)^2."""
    model = build_model("llama").double().eval()
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
    item = Item(ids, torch.arange(40) >= 31, "passkey", 32)
    settings = Settings(sink=2, recent=4, teacher_forced=teacher_forced)
    found = gauss_newton(model, item, settings, probes=150)
    layers, step = Layers(model), 0.01
    expected = torch.zeros_like(found)
    with layers.tapped():
        streams = Streams(layers, settings)
        for layer in range(layers.count):
            for head in range(layers.kv_heads):
                gates = torch.ones_like(found)
                gates[layer, head] -= step
                run = streams.forward(item, gates)
                expected[layer, head] = float(streams.loss(run, item)) / step**2
    torch.testing.assert_close(found, expected, rtol=0.35, atol=0)


def test_sliding_layers_score_nothing() -> None:
    item = Item(torch.arange(3, 27), torch.arange(24) >= 15, "passkey", 16)
    found = gauss_newton(build_model("qwen2").eval(), item, Settings(sink=2, recent=4), probes=2)
    assert (found[0] > 0).all()
    assert (found[1:] == 0).all()
