"""What a model costs to hold and to run: bytes of real storage, memory high water, times, and ratios in pairs."""

from compress.evalsuite.efficiency.highwater import HighWater, free_bytes
from compress.evalsuite.efficiency.paired import Row, exact_row, paired_row
from compress.evalsuite.efficiency.passes import Pass, kv_bytes, mean_pass, random_prompt, timed_pass
from compress.evalsuite.efficiency.storage import Storage, allocated
from compress.evalsuite.efficiency.table import table

__all__ = [
    "HighWater",
    "Pass",
    "Row",
    "Storage",
    "allocated",
    "exact_row",
    "free_bytes",
    "kv_bytes",
    "mean_pass",
    "paired_row",
    "random_prompt",
    "table",
    "timed_pass",
]
