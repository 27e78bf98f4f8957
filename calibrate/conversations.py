"""What stands in a row: plain text, or a conversation that the tokenizer's chat template renders."""

from collections.abc import Mapping, Sequence

import jinja2
from transformers import PreTrainedTokenizerBase


def render(cell: object, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The text of one row.

    Args:
        cell: a string; a conversation, i.e. a list of ``{"role": ..., "content": ...}``; or None.
        tokenizer: renders conversations with its chat template. Without one, or where the template refuses the
            conversation, the turns are joined by blank lines.

    Returns:
        The text, empty for None; or None when the cell is neither text nor a conversation.
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    if not isinstance(cell, Sequence) or not all(_is_turn(turn) for turn in cell):
        return None
    turns = [{"role": str(turn["role"]), "content": turn["content"]} for turn in cell]
    if tokenizer is not None and tokenizer.chat_template:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except jinja2.TemplateError:
            pass  # a template may insist on alternating roles or forbid a system turn
    return "\n\n".join(turn["content"] for turn in turns)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn
