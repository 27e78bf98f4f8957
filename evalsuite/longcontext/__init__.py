"""Questions about long prompts, under the names and with the scoring of RULER (arXiv 2404.06654), made here.

Prompts are generated from a seed, sized by the tokenizer at hand, and need neither network nor data: the haystack is
any text, or RULER's repeated sentences. Passkey is from arXiv 2305.16300, line retrieval from LongEval. The wording is
ours: scores compare models here, not with published tables. RULER's question answering, which needs data sets and is
the only part scored by ``string_match_part``, is left out.
"""

from compress.evalsuite.longcontext.run import Answer, Cell, Result, grid, long_context, results
from compress.evalsuite.longcontext.settings import TASKS, LongContextSettings, check_long_context
from compress.evalsuite.longcontext.store import prepare

__all__ = [
    "TASKS",
    "Answer",
    "Cell",
    "LongContextSettings",
    "Result",
    "check_long_context",
    "grid",
    "long_context",
    "prepare",
    "results",
]
