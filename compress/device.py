"""Where things run."""

import torch

from compress.calibrate.errors import InputError


def pick_dtype(device: torch.device) -> torch.dtype:
    """What a device computes in by default: float32 on a CPU, on a GPU bfloat16 where it has it, else float16."""
    if device.type == "cpu":
        return torch.float32
    with torch.cuda.device(device):  # the question is about the current one
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pick_device(name: str, option: str = "--device") -> torch.device:
    """The device that a name means; ``auto`` is a GPU where there is one.

    Raises:
        InputError: an unknown device, or one that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(option, name, "is not a device", allowed="auto, cpu, cuda, cuda:N") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    if not present.get(device.type, False):
        raise InputError(option, name, "this machine has none, or PyTorch doesn't see it", fix="use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(option, name, f"this machine has {torch.cuda.device_count()} of them")
    return device
