"""Renders a checkpoint's chat template, which is code of unknown origin, inside jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dgemma_ext.errors import CheckpointError

# The deepest data that a template gets. Its macros take several of Python's frames a level, of which there are 1,000 by
# default; the tool calls that tool_call.py reads are less deep, with the messages around them.
_MAX_DEPTH = 120


class ChatTemplate:
    """A compiled template and its file, which every error names.

    The environment is that of transformers' `apply_chat_template`: blocks trimmed, loop controls, `tojson`,
    `raise_exception`, `strftime_now`, `generation` blocks. Variables are plain JSON values only.
    """

    def __init__(self, source: str, file: Path) -> None:
        self.source = source
        self.file = file
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = environment.parse(source).find_all(jinja2.nodes.Name)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template, line {error.lineno}: {error.message}", file=file) from error
        # The names that the template reads: its variables, and names of its own.
        self._names = frozenset(node.name for node in names if node.ctx == "load")

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, Path]]:
        return ChatTemplate, (self.source, self.file)  # a compiled template cannot be copied

    def reads(self, variable: str) -> bool:
        """Whether the template reads a variable of this name."""
        return variable in self._names

    def render(self, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """Renders the template with `variables`. `now` is the time of `strftime_now`, default the present.

        Raises ValueError where a variable is not plain JSON or the template itself refuses the messages, and
        CheckpointError where the template fails or tries to leave the sandbox.
        """
        checked = {name: json_value(name, value) for name, value in variables.items()}
        checked["strftime_now"] = partial(_strftime, now or datetime.now())
        try:
            return self._template.render(checked)
        except _RefusedMessages as error:
            raise ValueError(f"messages: the chat template in {self.file} refuses them: {error.message}") from error
        except Exception as error:  # a template can raise anything that an expression can
            raise CheckpointError(f"chat template: {type(error).__name__}: {error}", file=self.file) from error


class _RefusedMessages(jinja2.TemplateError):
    """The error that a template's call of raise_exception raises."""


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # The base class returns an undefined value, which prints as nothing.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


class _PlainNamespace(Namespace):
    """A namespace whose attributes cannot pass for Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's text for training; here it renders its content only."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
    )
    environment.filters["tojson"] = _tojson
    # jinja2's other globals are left out: templates do not use them.
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's range has a bounded length
        "dict": _dict,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
    }
    return environment


def json_value(name: str, value: Any) -> Any:
    """`value` rebuilt from JSON's own types, so that a template meets no object with methods of its own."""
    try:
        data = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not plain data (strings, numbers, lists, dictionaries): {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested deeper than {_MAX_DEPTH} levels") from error
    level = [data]
    for _ in range(_MAX_DEPTH + 1):
        level = [item for one in level if isinstance(one, dict | list) for item in _items(one)]
    if level:
        raise ValueError(f"{name} is nested deeper than {_MAX_DEPTH} levels")
    return data


def _items(data: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return data.values() if isinstance(data, dict) else data


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _namespace(*args: Any, **kwargs: Any) -> _PlainNamespace:
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _check_attribute(name)
    return _PlainNamespace(attributes)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedMessages(message)


def _strftime(now: datetime, pattern: str) -> str:
    return now.strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
