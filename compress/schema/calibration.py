"""The section ``calibration``: the text that methods look at."""

from pydantic import Field, model_validator

from compress.calibrate.errors import InputError
from compress.options import LARGEST_SEED
from compress.schema.fields import Section


class Calibration(Section):
    """The text whose layer inputs the methods look at."""

    source: str = Field(
        default="auto",
        min_length=1,
        description="Where the text comes from: auto (the Hub if it can be reached, else self), self (the model writes"
        " it), a .txt/.jsonl/.parquet file, pydoc (Python's documentation), or NAME[:CONFIG[:SPLIT[:COLUMN]]] on the"
        " Hub.",
    )
    column: str = Field(
        default="text", min_length=1, description="Column or field that holds the text, if source names none."
    )
    samples: int = Field(default=128, ge=1, description="Number of windows.")
    seq_len: int = Field(default=2048, ge=2, description="Tokens a window.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of windows, rotations, every random choice.")
    expansion: int = Field(
        default=1,
        ge=1,
        description="RSQ's dataset expansion: every window is used this often, rotated by seq_len / expansion.",
    )

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        if self.expansion > self.seq_len:
            raise InputError(
                "calibration.expansion", self.expansion, f"a window has only {self.seq_len} tokens to rotate by"
            )
        return self
