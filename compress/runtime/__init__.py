"""Loading what was made, or any other model, and running it.

``load`` gives a transformers model. That of an artifact holds its linear layers packed (``linear.py``), read file by
file without a dense copy (``packed.py``); on a CPU its decoder answers one new token in fused C++ steps
(``decoder.py``) over a cache with room to grow (``cache.py``). An artifact with an attention plan answers with the
plan's cache (``plan_cache.py``) through the plan's attention function (``compress/kv/attention.py``).
"""

from compress.kv.growing import GrowingCache
from compress.runtime.answer import generate
from compress.runtime.linear import Compute, PackedLinear
from compress.runtime.loading import Unloaded, find, load
from compress.runtime.plan_cache import PlanCache

__all__ = ["Compute", "GrowingCache", "PackedLinear", "PlanCache", "Unloaded", "find", "generate", "load"]
