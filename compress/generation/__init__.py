"""Text from a model, token by token: any transformers model that has ``generate``, packed or dense.

``compress generate`` and ``compress serve`` both answer with :func:`complete`, so what they say is the same.
"""

from compress.generation.completion import Piece, ScoredToken, Task, TokenScore, complete
from compress.generation.sampling import Sampling
from compress.generation.text import TextStream

__all__ = ["Piece", "Sampling", "ScoredToken", "Task", "TextStream", "TokenScore", "complete"]
