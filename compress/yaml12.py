"""YAML as people write it today: the core schema of YAML 1.2, with PyYAML underneath.

PyYAML follows YAML 1.1, where ``no`` is false, ``1e-3`` is a string, ``010`` is eight and ``12:30`` is 750. In a recipe
each of these would be a silent surprise (``untie: no``, ``damp: 1e-3``), so only what YAML 1.2 calls a boolean, a
number or null is one here. A key that is written twice is an error instead of a silent override.
"""

import re
from typing import Any

import yaml

_RESOLVERS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
)


class _Loader(yaml.SafeLoader):
    """Reads the YAML 1.2 core schema and refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word, not a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """A decimal integer: a leading zero doesn't make it octal."""
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something else than a string; one line a string."""

    def represent_line(self, text: str) -> yaml.ScalarNode:
        """A string; double quotes write a line break as an escape."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Dumper.add_representer(str, _Dumper.represent_line)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


class YamlError(ValueError):
    """Text that isn't YAML; the message names the line."""


def parse(text: str) -> Any:
    """The value that a YAML text stands for: dict, list, str, int, float, bool or None.

    Raises:
        YamlError: the text isn't valid YAML, or a mapping has a key twice.
    """
    try:
        # The loader derives from SafeLoader: no tag can construct anything but plain data.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML doesn't allow
        raise YamlError(" ".join(str(error).split())) from error


def inline(value: Any) -> str:
    """A value on one line, such that ``parse(inline(value)) == value``; tuples become lists."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump([plain], Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.strip()[1:-1]
