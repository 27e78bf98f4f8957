"""The section ``act``: attention sinks that are given less weight, in heads that gain by it."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field

from compress.options import LARGEST_SEED
from compress.schema.fields import Section, listed


class Act(Section):
    """Attention calibration: an option for accuracy on a family of tasks, which saves nothing."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=(),
        description="lm-eval tasks by whose questions heads are chosen; none for text. The choice holds for questions"
        " of their kind.",
    )
    split: Literal["train", "validation"] = Field(
        default="train", description="Which of their questions; never those that are scored afterwards."
    )
    task_path: str | None = Field(default=None, description="Folder with further lm-eval task files.")
    text: str = Field(
        default="pydoc",
        min_length=1,
        description="Without tasks: a text whose windows are asked to go on, as calibration.source.",
    )
    tokens: int = Field(default=512, ge=8, description="Tokens of such a window, and of a task's question at most.")
    items: int = Field(default=256, ge=8, description="Questions a task, or windows.")
    objective: Literal["answer", "choice"] = Field(
        default="answer",
        description="The loss: of the right answer's tokens, or of the choice among a question's answers, which takes a"
        " pass for each of them.",
    )
    beta: float = Field(default=0.4, ge=0, le=1, description="What the weight of sinks is multiplied by.")
    alpha: Annotated[float, Gt(0)] = Field(
        default=5.0,
        description="A token is a sink if the mean attention that it gets is above alpha divided by the number of"
        " tokens.",
    )
    threshold: Annotated[float, Gt(0), Le(1)] | None = Field(
        default=None, description="A fixed bound instead of alpha's; published code has 0.1."
    )
    edge_layers: Annotated[int, Ge(0)] = Field(
        default=2, description="First and last layers that are left as they are."
    )
    level: float = Field(
        default=0.05, gt=0, le=1, description="Largest expected share of chosen heads that gain by chance only."
    )
    holdout: float = Field(
        default=0.25,
        ge=0,
        le=0.5,
        description="Share of the questions that don't choose, on which the loss must be lower or nothing is changed; 0"
        " leaves the check out.",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Of the choice of questions.")
