"""Bytes of real storage, against sums made by hand."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from compress.evalsuite.efficiency import allocated
from models import build_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Slots:
    __slots__ = ("__private", "empty", "scale")

    def __init__(self) -> None:
        self.scale = torch.zeros(3)
        self.__private = torch.zeros(5)


@dataclass
class Packed:
    codes: Tensor = field(default_factory=lambda: torch.zeros(4, 7, dtype=torch.int32))
    rest: dict[str, Any] = field(default_factory=lambda: {"zero": [torch.zeros(2, dtype=torch.float16)], "n": 3})


class Wrapper(Tensor):
    """A tensor subclass that holds its data in two others, as torchao's quantized tensors do."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(lambda x: x.codes.float() if isinstance(x, Wrapper) else x, args), **(kwargs or {}))


@pytest.mark.parametrize(
    ("thing", "nbytes"),
    [
        (torch.zeros(3, 5), 60),
        (torch.zeros(100)[:2], 400),  # a view keeps all of it
        (torch.zeros(1, 4).expand(9, 4), 16),
        (torch.zeros(8, device="meta"), 0),
        ([torch.zeros(2), (torch.zeros(3), {torch.zeros(1)}), deque([torch.zeros(4)])], 40),
        (Packed(), 4 * 7 * 4 + 2 * 2),
        (Slots(), 12 + 20),
        (Wrapper(torch.zeros(6, dtype=torch.int8), torch.zeros(1)), 6 + 4),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), (6 + 2 + 4 * 2) * 4 + 8),
        (None, 0),
        ({"text": "abc", "number": 7, "type": Slots}, 0),
    ],
)
def test_bytes_of(thing: Any, nbytes: int) -> None:
    assert allocated(thing).nbytes == nbytes


def test_what_is_shared_counts_once() -> None:
    tensor = torch.zeros(10)
    ring: dict[str, Any] = {"whole": tensor, "view": tensor[3:], "half": tensor.view(torch.float16)}
    ring["ring"] = ring
    assert allocated(ring).nbytes == 40


def test_what_belongs_to_another_does_not_count() -> None:
    model = build_model("llama")
    codes = torch.zeros(9, dtype=torch.uint8)
    assert allocated({"codes": codes, "model": model}, besides=model).nbytes == 9


@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_weights_are_parameters_once_and_the_frequencies_of_rope(name: str) -> None:
    model = build_model(name)
    found = allocated(model)
    frequencies = sum(buffer.untyped_storage().nbytes() for buffer in {id(b): b for b in model.buffers()}.values())
    parameters = model.num_parameters()  # a tied head counts once
    assert 4 * parameters < found.nbytes <= 4 * parameters + frequencies
    assert found.elements == found.nbytes // 4
    assert allocated(model.half()).nbytes < 0.51 * found.nbytes
