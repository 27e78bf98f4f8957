"""The keys of a recipe: one frozen pydantic model a section, in the order in which the stages run.

This package is the only place where a key is described: the comments of the shipped recipes, ``compress recipes keys``,
the resolved ``recipe.yaml`` of an artifact and the "allowed" part of error messages are made from it by
``compress.keys``.
"""

from compress.schema.act import Act
from compress.schema.calibration import Calibration
from compress.schema.fields import Allowed, Section
from compress.schema.heads import Heads
from compress.schema.kv import KV
from compress.schema.output import Eval, Export
from compress.schema.share import Sharing
from compress.schema.sparse import Sparse
from compress.schema.weights import Weights

__all__ = [
    "KV",
    "SECTIONS",
    "Act",
    "Allowed",
    "Calibration",
    "Eval",
    "Export",
    "Heads",
    "Section",
    "Sharing",
    "Sparse",
    "Weights",
]

SECTIONS: dict[str, type[Section]] = {
    "calibration": Calibration,
    "share": Sharing,
    "weights": Weights,
    "heads": Heads,
    "sparse": Sparse,
    "kv": KV,
    "act": Act,
    "export": Export,
    "eval": Eval,
}
