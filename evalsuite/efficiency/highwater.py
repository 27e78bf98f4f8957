"""How much memory was in use at most: of this process on a CPU, of PyTorch's tensors on a GPU."""

from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of resident memory to what is resident now


class HighWater:
    """Peak memory beyond what is in use when this is made, which on a CPU is the interpreter with its libraries.

    On a CPU it is the kernel's own record of resident memory (``VmHWM``), which misses nothing; other systems than
    Linux have none that can be begun anew.

    Args:
        device: where the model will be.

    Attributes:
        resettable: whether ``reset`` works here; if not, every peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.resettable = device.type == "cuda" or _can_reset()
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or 0

    def reset(self) -> None:
        """Forget higher memory than now, where this is possible."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.resettable:
            _RESET.write_text(_RESET_PEAK)

    def peak(self) -> int | None:
        """Bytes at most since the last reset; None where this system doesn't say."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._base
        peak = _status("VmHWM")
        return None if peak is None else peak - self._base


def free_bytes(device: torch.device) -> int:
    """Memory that another model could take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _can_reset() -> bool:
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    """A line of Linux's account of this process, in bytes."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
