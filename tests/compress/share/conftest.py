"""A tiny model that was trained, and one in which a layer's attention stands twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model, build_tokenizer
from share_cases import TWIN, made_up


def _sizes(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_hidden_layers": layers, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


@pytest.fixture(scope="session")
def _trained() -> Any:
    torch.manual_seed(0)
    model: Any = build_model("llama_untied", **_sizes(3))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
        else:
            torch.nn.init.ones_(parameter)
    for layer in model.model.layers[:-1]:  # so that all depends on the last one's attention
        layer.self_attn.o_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.requires_grad_(False)
    steps, learner = 120, torch.optim.AdamW(model.parameters(), lr=8e-3)
    for step in range(steps):
        ids = made_up(8, 64, step)
        model(ids, labels=ids).loss.backward()
        learner.step()
        learner.zero_grad()
        learner.param_groups[0]["lr"] = 8e-3 * (1 - step / steps)
    return model.requires_grad_(False).eval()


@pytest.fixture
def twins(_trained: Any) -> Any:
    """Four layers: the trained ones, and before the last a layer that attends as it does and does nothing with it.

    Its heads stand in another order: head h of layer 3 attends as head ``TWIN[h]`` of layer 2.
    """
    model: Any = build_model("llama_untied", **_sizes(4))
    former = _trained.state_dict()
    state = {name: former[name] for name in former if ".layers.2." not in name}
    for name, tensor in former.items():
        if ".layers.2." in name:
            state[name.replace(".layers.2.", ".layers.3.")] = tensor
            state[name] = torch.zeros_like(tensor) if "o_proj" in name or "down_proj" in name else tensor.clone()
    order = torch.tensor(TWIN).argsort()
    for module in ("q_proj", "k_proj"):
        name = f"model.layers.2.self_attn.{module}.weight"
        state[name] = state[name].unflatten(0, (4, -1))[order].flatten(0, 1)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Saves a model with a tokenizer."""

    def save(model: Any) -> Path:
        model.save_pretrained(tmp_path / "model")
        build_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save
