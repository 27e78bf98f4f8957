"""Activations in a file."""

from pathlib import Path

import pytest
import torch
from compress.calibrate.stream import ActivationFile

SHAPE = (3, 5, 4)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = torch.randn(SHAPE)
    file = ActivationFile(tmp_path / "a.bin", SHAPE)
    for i in range(3):
        file[i] = values[i]
    file.flush()
    assert len(file) == 3
    assert (tmp_path / "a.bin").read_bytes() == values.numpy().tobytes()
    again = ActivationFile(tmp_path / "a.bin", SHAPE)
    for i in range(3):
        assert torch.equal(again[i], values[i])


def test_a_sample_is_a_view_and_rounds_nothing_else(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", SHAPE)
    file[1] = torch.full((5, 4), 1 / 3, dtype=torch.float64)
    assert torch.equal(file[1], torch.full((5, 4), 1 / 3))
    assert torch.equal(file[0], torch.zeros(5, 4))
    file[1] += 1
    assert float(file[1][0, 0]) == pytest.approx(4 / 3)


def test_size(tmp_path: Path) -> None:
    ActivationFile(tmp_path / "a.bin", SHAPE)
    assert (tmp_path / "a.bin").stat().st_size == ActivationFile.nbytes(SHAPE) == 240


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 5, 4)])
def test_a_file_of_another_size_is_refused_and_kept(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    file = ActivationFile(tmp_path / "a.bin", SHAPE)
    file[0] = torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"a\.bin holds 240 bytes, expected"):
        ActivationFile(tmp_path / "a.bin", shape)
    assert torch.equal(ActivationFile(tmp_path / "a.bin", SHAPE)[0], torch.ones(5, 4))


def test_a_value_of_another_shape_is_refused(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a.bin", SHAPE)
    with pytest.raises(RuntimeError):
        file[0] = torch.ones(4, 4)
