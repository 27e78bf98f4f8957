"""Recipe: everything that decides what a run does, as one YAML file with flat sections in the order in which they run.

    base: rsq                # a shipped recipe, or a path relative to this file
    weights: {bits: 4}       # changes single keys of the inherited section
    eval: null               # removes it: an absent section doesn't run

The same keys serve in YAML, on the command line (``--set weights.bits=4``) and in Python
(``Recipe.load({"base": "rsq", "weights": {"bits": 4}})``). A key that doesn't exist is an error that names the nearest.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from compress.calibrate.errors import InputError, did_you_mean
from compress.keys import allowed, comment, nearest
from compress.schema import KV, SECTIONS, Act, Calibration, Eval, Export, Heads, Section, Sharing, Sparse, Weights
from compress.yaml12 import YamlError, inline, parse

_FOLDER = Path(__file__).parent / "recipes"
_TEXTS = ("name", "description")
_COMMENT_WIDTH = 100


class Recipe(Section):
    """A resolved recipe: ``base`` is merged in, every key is checked. Frozen; change it with :meth:`load`.

    Attributes:
        name: what a report calls it.
        description: one line.
        calibration: the text that methods look at, or None.
        share: layers that take attention of an earlier one, or None.
        weights: weight quantization, or None.
        heads: which heads keep every token, or None.
        sparse: heads that search for the tokens that they attend, or None.
        kv: quantization of the KV cache, or None.
        act: attention calibration, or None.
        export: what is written; always there, with its defaults if the file has no such section.
        eval: scoring, or None.
    """

    name: str = "custom"
    description: str = ""
    calibration: Calibration | None = None
    share: Sharing | None = None
    weights: Weights | None = None
    heads: Heads | None = None
    sparse: Sparse | None = None
    kv: KV | None = None
    act: Act | None = None
    export: Export = Export()
    eval: Eval | None = None

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.share is not None and self.calibration is None:
            raise InputError(
                "share",
                self.share.method,
                "layers are chosen and fitted on calibration text, and the recipe has no section 'calibration'",
                fix="add the section (`calibration: {}` or --calibration auto)",
            )
        if self.weights is not None and self.weights.method == "gptq" and self.calibration is None:
            raise InputError(
                "weights.method",
                "gptq",
                "the Hessian needs calibration text, and the recipe has no section 'calibration'",
                fix="add the section (`calibration: {}` or --calibration auto), or use method rtn",
            )
        if self.weights is not None and self.weights.tune_epochs and self.calibration is None:
            raise InputError(
                "weights.tune_epochs",
                self.weights.tune_epochs,
                "tuning needs calibration text, and the recipe has no section 'calibration'",
                fix="add the section (`calibration: {}` or --calibration auto), or set weights.tune_epochs=0",
            )
        if self.sparse is not None and self.sparse.method == "sea" and self.calibration is None:
            raise InputError(
                "sparse.method",
                "sea",
                "estimators learn from calibration text, and the recipe has no section 'calibration'",
                fix="add the section (`calibration: {}` or --calibration auto), or use method hip",
            )
        if self.kv is not None and self.kv.budget is not None and self.calibration is None:
            raise InputError(
                "kv.budget",
                self.kv.budget,
                "bits are chosen by errors on calibration text, and the recipe has no section 'calibration'",
                fix="add the section (`calibration: {}` or --calibration auto), or set kv.budget=null",
            )
        return self

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Any] | Recipe", overrides: Sequence[str] = ()) -> "Recipe":
        """Read, inherit, override and check a recipe.

        Args:
            source: the name of a shipped recipe, the path of a ``.yaml`` file, the same content as a mapping, or a
                recipe.
            overrides: ``section.key=value`` with the value as YAML, ``name=text``, ``section=null``, or
                ``section=RECIPE`` for the section of that name of another recipe, in order; ``section?.key=value`` is
                only for a recipe that has the section.

        Raises:
            InputError: unknown recipe, section or key; a value of the wrong type or out of range; keys that exclude
                each other; YAML that can't be read; bases that form a circle.
        """
        data = _resolved(source)
        for override in overrides:
            _apply(data, override)
        try:
            return cls.model_validate({key: value for key, value in data.items() if value is not None})
        except ValidationError as error:
            raise _as_input_error(error.errors()[0]) from error

    @staticmethod
    def shipped() -> dict[str, str]:
        """Name and description of every recipe that comes with the package."""
        return {path.stem: _read(path)["description"] for path in sorted(_FOLDER.glob("*.yaml"))}

    def to_yaml(self) -> str:
        """The whole recipe as YAML, a comment above every key; :meth:`load` reads it back to an equal recipe."""
        lines = [f"{key}: {inline(getattr(self, key))}" for key in _TEXTS]
        for section in SECTIONS:
            values = getattr(self, section)
            if values is None:
                continue
            lines += ["", f"{section}:"]
            for key in type(values).model_fields:
                lines += textwrap.wrap(
                    comment(section, key), _COMMENT_WIDTH, initial_indent="  # ", subsequent_indent="  # "
                )
                lines.append(f"  {key}: {inline(getattr(values, key))}")
        return "\n".join(lines) + "\n"

    def warnings(self) -> list[str]:
        """What is allowed but may surprise, one sentence each."""
        if self.weights is None:
            return []
        weights, found = self.weights, []
        low = sorted({bits for bits in (weights.bits, *weights.overrides.values()) if bits in (2, 3)})
        if low and not weights.symmetric:
            found.append(
                f"weights.symmetric=false with {' and '.join(map(str, low))} bits: transformers loads it, vLLM doesn't"
                " (it takes zero points at 4 and 8 bits only)"
            )
        if weights.method == "rtn":
            fields = Weights.model_fields
            idle = [key for key in ("act_order", "damp", "sweeps") if getattr(weights, key) != fields[key].default]
            found += [f"weights.{key} has no effect with method rtn" for key in idle]
        if weights.untie == "yes" and weights.rotation == "none" and weights.lm_head_bits == 16:
            found.append(
                "weights.untie=yes without rotation and with lm_head_bits=16 makes a tied model larger and no better"
            )
        return found


def recipe_source(name: str) -> str:
    """The file of a shipped recipe, or of a path, with its comments.

    Raises:
        InputError: there is no such recipe, or it can't be read.
    """
    return _text(_locate(name))


def _locate(name: str, folder: Path | None = None) -> Path:
    """The file behind a name or a path; a relative path starts at ``folder``."""
    if name.endswith((".yaml", ".yml")):
        path = (folder or Path()) / Path(name).expanduser()
        if not path.is_file():
            raise InputError("--recipe", name, "there is no such file")
        return path.resolve()
    names = [path.stem for path in sorted(_FOLDER.glob("*.yaml"))]
    if name not in names:
        raise InputError(
            "--recipe",
            name,
            "there is no such recipe",
            allowed=", ".join(names) + ", or the path of a .yaml file",
            fix=did_you_mean(name, names),
        )
    return _FOLDER / f"{name}.yaml"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("--recipe", path, f"the file can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError("--recipe", path, f"the file isn't UTF-8 text (byte {error.start})") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of one file, its ``base`` not yet resolved."""
    try:
        content = parse(_text(path))
    except YamlError as error:
        raise InputError("--recipe", path, f"not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError("--recipe", path, "a recipe is a mapping of sections", fix="start with e.g. `base: rsq`")
    return {"name": path.stem, "description": "", **content}


def _resolved(source: "str | Path | Mapping[str, Any] | Recipe") -> dict[str, Any]:
    """The merged content of a recipe and all its bases, as fresh dictionaries."""
    if isinstance(source, Recipe):
        return source.model_dump()
    if isinstance(source, Mapping):
        return _inherit(dict(source), None, ())
    path = _locate(str(source))
    return _inherit(_read(path), path.parent, (path,))


def _inherit(content: dict[str, Any], folder: Path | None, chain: tuple[Path, ...]) -> dict[str, Any]:
    """Lay ``content`` over its base, over the base's base, and so on; ``chain`` holds the files passed on the way."""
    _check_sections(content)
    base = content.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise InputError("base", base, "is neither the name of a recipe nor the path of a .yaml file")
        path = _locate(base, folder)
        if path in chain:
            names = " -> ".join(step.stem for step in (*chain, path))
            raise InputError("base", base, f"recipes inherit in a circle: {names}")
        merged = _inherit(_read(path), path.parent, (*chain, path))
    for key, value in content.items():
        inherited = merged.get(key)
        merged[key] = {**inherited, **value} if isinstance(inherited, dict) and isinstance(value, dict) else value
    return merged


def _check_sections(content: Mapping[str, Any]) -> None:
    """Refuse unknown sections and keys where they are written, so that an override can't hide a misspelling."""
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, Mapping):
            for key in value:
                _check_key(name, key)
        elif name in SECTIONS and value is not None:
            raise InputError(name, value, "is a section: a mapping of keys to values, or null to leave it out")
        elif name not in SECTIONS and name not in (*_TEXTS, "base"):
            raise _unknown("section", str(name), str(name), [*SECTIONS, *_TEXTS, "base"])


def _check_key(section: str, key: object) -> None:
    fields = SECTIONS[section].model_fields
    if key not in fields:
        raise _unknown("key", f"{section}.{key}", str(key), list(fields))


def _unknown(kind: str, option: str, name: str, names: list[str]) -> InputError:
    return InputError(option, None, f"there is no such {kind}", allowed=", ".join(names), fix=did_you_mean(name, names))


def _apply(data: dict[str, Any], override: str) -> None:
    """Put one ``section.key=value`` into ``data``."""
    target, equals, text = override.partition("=")
    section, dot, key = target.strip().partition(".")
    optional = bool(dot) and section.endswith("?")
    section = section.removesuffix("?") if optional else section
    if not equals:
        raise InputError("--set", override, "has no '='", allowed="section.key=value, as in weights.bits=4")
    try:
        value = parse(text)
    except YamlError as error:
        raise InputError("--set", override, f"the value is not valid YAML: {error}") from error
    if not dot and section in _TEXTS:
        data[section] = text.strip()
        return
    if section not in SECTIONS:
        raise _unknown("section", section, section, [*SECTIONS, *_TEXTS])
    if dot:
        _check_key(section, key)
        if not optional or data.get(section) is not None:
            data[section] = {**(data.get(section) or {}), key: value}
    elif value is None:
        data[section] = None
    elif isinstance(value, str):
        data[section] = _resolved(value).get(section)
        if data[section] is None:
            raise InputError(section, value, f"is a recipe without the section {section!r}")
    else:
        ways = f"{section}.KEY=value, {section}=RECIPE, or {section}=null"
        raise InputError(section, text, "is a section", allowed=ways)


def _as_input_error(details: ErrorDetails) -> InputError:
    """What pydantic found, in the words of the house."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    where = details["loc"]
    given = "null" if details["input"] is None else details["input"]
    if len(where) < 2:
        return InputError(str(where[0]), given, "is not text")
    field = SECTIONS[str(where[0])].model_fields[str(where[1])]
    inside = (
        f"[{where[2]}]"
        if len(where) > 2 and isinstance(field.get_default(call_default_factory=True), tuple | dict)
        else ""
    )
    option = f"{where[0]}.{where[1]}{inside}"
    problem = str(cause) if isinstance(cause, ValueError) else "is not one of the allowed values"
    return InputError(option, given, problem, allowed=allowed(field), fix=nearest(given, field))
