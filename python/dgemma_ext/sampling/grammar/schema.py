"""From a JSON schema to a pattern, sound or refused: what a schema's keyword does not rule, raises GrammarError.

An object has its properties in the schema's order and no others. Recursion is unrolled to a depth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling.grammar.formats import formats
from dgemma_ext.sampling.grammar.json_text import (
    BOOLEAN,
    INTEGER,
    LARGEST_OPEN_BOUND,
    NULL,
    NUMBER,
    Bound,
    JsonLayout,
    integers_between,
    numbers_between,
)
from dgemma_ext.sampling.grammar.pattern import LAST, Pattern, concat, repeat, union
from dgemma_ext.sampling.grammar.regex import search

# Keywords that say nothing of what is valid.
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"),
    *("deprecated", "readOnly", "writeOnly", "id"),  # id is $id's name up to draft 4
}
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set[str](),
    "null": set[str](),
}
_MOST_SCHEMA = 1_000_000
_MOST_COUNT = 10_000
_MOST_NESTING = 100


class _TooDeep(Exception):
    """A recursion has been unrolled to its depth: this alternative is left out."""


def schema_pattern(schema: Any, layout: JsonLayout, max_depth: int, place: str = "") -> Pattern:
    """The pattern of the texts that are valid. Raises GrammarError with the JSON pointer and the keyword.

    place: the JSON pointer of the schema itself, which those of errors begin with.
    """
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from error
    if size > _MOST_SCHEMA:
        raise GrammarError(f"the schema has {size} bytes, more than the limit of {_MOST_SCHEMA}; shorten it")
    try:
        return _Compiler(schema, layout, max_depth, place).compile(schema, place, ())
    except _TooDeep:
        message = f"no value ends within the recursion depth {max_depth}; raise max_depth"
        raise GrammarError(message, pointer=place or None) from None


def describes_objects(schema: Any) -> bool:
    """Whether all values of a schema are objects, as its types, properties, references and alternatives say."""
    return _Compiler(schema, JsonLayout(flexible=False), 1, "").has_objects_alone(schema)


class _Compiler:
    def __init__(self, root: Any, layout: JsonLayout, max_depth: int, place: str) -> None:
        self._root, self._layout, self._max_depth, self._place = root, layout, max_depth, place
        self._formats: dict[str, Pattern] | None = None

    def compile(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        if pointer.count("/") - self._place.count("/") > _MOST_NESTING:
            raise GrammarError(f"is nested deeper than {_MOST_NESTING} levels", pointer=pointer)
        if schema is True:
            return self._layout.any_value(self._max_depth)
        if not isinstance(schema, Mapping):
            raise GrammarError(f"must be a schema that allows a value, got {schema!r}", pointer=pointer)
        keywords = [keyword for keyword in schema if keyword not in _ANNOTATIONS]
        for keyword, method in self._whole().items():
            if keyword in schema:
                says_type = keyword in ("enum", "const") or self._have_its_type(schema, keyword, pointer)
                allowed = {keyword, "type"} if says_type else {keyword}
                self._only(keywords, allowed, pointer, f"does not go with {keyword}")
                return method(schema, pointer, references)
        if not keywords:
            return self._layout.any_value(self._max_depth)
        types = self._types(schema, keywords, pointer)
        known = {"type"}.union(*(_OF_TYPE[kind] for kind in types))
        self._only(keywords, known, pointer, f"is not supported for {' or '.join(types)}")
        return union(self._of_type(kind, schema, pointer, references) for kind in types)

    def _whole(self) -> dict[str, Callable[[Any, str, tuple[str, ...]], Pattern]]:
        """The keywords that say all of a schema."""
        return {
            "$ref": self._reference,
            "const": self._const,
            "enum": self._enum,
            "anyOf": self._any_of,
            "oneOf": self._one_of,
            "allOf": self._all_of,
        }

    def _have_its_type(self, schema: Any, keyword: str, pointer: str) -> bool:
        """Whether all that a keyword refers to is of the types that stand beside it, which then say nothing more."""
        referred = [{"$ref": schema["$ref"]}] if keyword == "$ref" else schema[keyword]
        if "type" not in schema or not isinstance(referred, list):
            return False
        try:
            own = _types_of({"type": schema["type"]}) or set()
            found = [_types_of(self._resolved(one, pointer)) for one in referred]
        except (TypeError, AttributeError):  # what is no schema is refused where it is compiled
            return False
        return all(types is not None and types <= own for types in found)

    def _only(self, keywords: list[str], known: set[str], pointer: str, why: str) -> None:
        for keyword in keywords:
            if keyword not in known:
                raise GrammarError(why, pointer=pointer, keyword=keyword)

    def _types(self, schema: Any, keywords: list[str], pointer: str) -> list[str]:
        given = schema.get("type")
        if given is None:
            # What only one type has, tells it; but other types would be valid too, so it must be an object or array.
            guessed = [kind for kind in ("object", "array") if _OF_TYPE[kind].intersection(keywords)]
            if len(guessed) != 1:
                keyword = keywords[0]
                raise GrammarError("is not supported without a type", pointer=pointer, keyword=keyword)
            return guessed
        types = list(given) if isinstance(given, list) else [given]
        if not types or any(kind not in _TYPES for kind in types):
            raise GrammarError(f"must be of {', '.join(_TYPES)}, got {given!r}", pointer=pointer, keyword="type")
        # Every integer is a number.
        return [kind for kind in types if kind != "integer" or "number" not in types]

    def _of_type(self, kind: str, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        if kind == "object":
            return self._object(schema, pointer, references)
        if kind == "array":
            return self._array(schema, pointer, references)
        if kind == "string":
            return self._string(schema, pointer)
        if kind in ("integer", "number"):
            return self._number(schema, pointer, kind)
        return BOOLEAN if kind == "boolean" else NULL

    # References and alternatives ----------------------------------------------------------------------------------

    def _reference(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        target = schema["$ref"]
        found = self._find(target, pointer)
        if references.count(target) >= self._max_depth:
            raise _TooDeep
        if len(references) >= _MOST_NESTING:
            raise GrammarError("refers to itself without a value between", pointer=pointer, keyword="$ref")
        return self.compile(found, self._place + target.removeprefix("#"), (*references, target))

    def _find(self, target: Any, pointer: str) -> Any:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            message = f"must be a pointer into this schema (#/...), got {target!r}"
            raise GrammarError(message, pointer=pointer, keyword="$ref")
        found = self._root
        for part in target.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise GrammarError(f"points to {target}, which is not there", pointer=pointer, keyword="$ref")
        return found

    def _const(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        return self._values([schema["const"]], schema, pointer, "const")

    def _enum(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        if not isinstance(schema["enum"], list):
            raise GrammarError("must be a list of values", pointer=pointer, keyword="enum")
        return self._values(schema["enum"], schema, pointer, "enum")

    def _values(self, values: list[Any], schema: Any, pointer: str, keyword: str) -> Pattern:
        if "type" in schema:
            types = self._types(schema, ["type"], pointer)
            values = [value for value in values if any(_is_of(value, kind) for kind in types)]
        if not values:
            raise GrammarError("has no value that is valid", pointer=pointer, keyword=keyword)
        return union(self._layout.value(value) for value in values)

    def _any_of(self, schema: Any, pointer: str, references: tuple[str, ...], keyword: str = "anyOf") -> Pattern:
        alternatives = schema[keyword]
        if not isinstance(alternatives, list) or not alternatives:
            raise GrammarError("must be a list of schemas", pointer=pointer, keyword=keyword)
        found = []
        for index, one in enumerate(alternatives):
            try:
                found.append(self.compile(one, f"{pointer}/{keyword}/{index}", references))
            except _TooDeep:
                continue
        if not found:
            raise _TooDeep
        return union(found)

    def _one_of(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        pattern = self._any_of(schema, pointer, references, "oneOf")
        alternatives = [self._resolved(one, pointer) for one in schema["oneOf"]]
        for index, one in enumerate(alternatives):
            if any(not _are_apart(one, other, self._resolved_property(pointer)) for other in alternatives[:index]):
                message = "has alternatives that one value might match; make them anyOf, or tell them apart by type"
                raise GrammarError(message, pointer=pointer, keyword="oneOf")
        return pattern

    def _resolved(self, schema: Any, pointer: str) -> Any:
        for _ in range(_MOST_NESTING):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._find(schema["$ref"], pointer)
        return schema

    def has_objects_alone(self, schema: Any, depth: int = 0) -> bool:
        found = self._resolved(schema, "")
        if not isinstance(found, Mapping) or depth > _MOST_NESTING:
            return False
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in found:
                parts = found[keyword]
                return isinstance(parts, list) and all(self.has_objects_alone(part, depth + 1) for part in parts)
        values = _values_of(found)
        if isinstance(values, list):
            return all(isinstance(value, Mapping) for value in values)
        return found.get("type", "object" if "properties" in found else None) in ("object", ["object"])

    def _resolved_property(self, pointer: str) -> Callable[[Any], Any]:
        return lambda schema: self._resolved(schema, pointer)

    def _all_of(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        parts = schema["allOf"]
        if not isinstance(parts, list) or len(parts) != 1:
            raise GrammarError("is supported with one schema alone", pointer=pointer, keyword="allOf")
        return self.compile(parts[0], f"{pointer}/allOf/0", references)

    # Types --------------------------------------------------------------------------------------------------------

    def _object(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise GrammarError("must be an object of schemas", pointer=pointer, keyword="properties")
        if not isinstance(required, list):
            raise GrammarError("must be a list of names", pointer=pointer, keyword="required")
        further = schema.get("additionalProperties")
        if not properties and further is not False:
            if required:
                raise GrammarError("names what properties do not describe", pointer=pointer, keyword="required")
            if "properties" in schema and further is None:
                return self._layout.object([])
            return self._layout.map(self._map_value(further, pointer, references))
        if further is not None and not isinstance(further, bool):
            message = "is supported as true or false beside properties"
            raise GrammarError(message, pointer=pointer, keyword="additionalProperties")
        unknown = [name for name in required if name not in properties]
        if unknown:
            message = f"names {unknown[0]!r}, which properties do not describe"
            raise GrammarError(message, pointer=pointer, keyword="required")
        members = []
        for name, one in self._layout.in_order(properties):
            place = f"{pointer}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            try:
                if one is False and name not in required:
                    continue
                value = self.compile(one, place, references)
            except _TooDeep:
                if name in required:
                    raise
                continue
            members.append((name in required, concat(self._layout.key(name), value)))
        return self._layout.object(members)

    def _map_value(self, further: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        if further in (None, True):
            return self._layout.any_value(self._max_depth - 1)
        return self.compile(further, f"{pointer}/additionalProperties", references)

    def _array(self, schema: Any, pointer: str, references: tuple[str, ...]) -> Pattern:
        least, most = self._counts(schema, pointer, "minItems", "maxItems")
        if "prefixItems" in schema:
            return self._tuple(schema, pointer, references, least, most)
        items = schema.get("items", True)
        if items is False:
            if least > 0:
                raise GrammarError("leaves no item, and minItems wants some", pointer=pointer, keyword="items")
            return self._layout.tuple([])
        try:
            item = self.compile(items, f"{pointer}/items", references)
        except _TooDeep:
            if least > 0:
                raise
            return self._layout.tuple([])
        return self._layout.array(item, least, most) if most != 0 else self._layout.tuple([])

    def _tuple(self, schema: Any, pointer: str, references: tuple[str, ...], least: int, most: int | None) -> Pattern:
        items = schema["prefixItems"]
        if not isinstance(items, list):
            raise GrammarError("must be a list of schemas", pointer=pointer, keyword="prefixItems")
        if schema.get("items", False) is not False:
            raise GrammarError("is supported as false beside prefixItems", pointer=pointer, keyword="items")
        if least > len(items):
            raise GrammarError("wants more items than prefixItems has", pointer=pointer, keyword="minItems")
        items = items if most is None else items[:most]
        return self._layout.tuple(
            [self.compile(one, f"{pointer}/prefixItems/{index}", references) for index, one in enumerate(items)]
        )

    def _string(self, schema: Any, pointer: str) -> Pattern:
        least, most = self._counts(schema, pointer, "minLength", "maxLength")
        for keyword in ("pattern", "format"):
            if keyword in schema:
                for other in ("minLength", "maxLength", "pattern", "format"):
                    if other in schema and other != keyword:
                        raise GrammarError(f"is not supported beside {keyword}", pointer=pointer, keyword=other)
        if "pattern" in schema:
            return self._matching(schema["pattern"], pointer)
        if "format" in schema:
            self._formats = self._formats or formats()
            if schema["format"] not in self._formats:
                message = f"{schema['format']!r} is not supported; of {', '.join(self._formats)}"
                raise GrammarError(message, pointer=pointer, keyword="format")
            return self._layout.quoted(self._formats[schema["format"]])
        return self._layout.quoted(repeat(self._layout.character, least, most))

    def _matching(self, expression: Any, pointer: str) -> Pattern:
        """A pattern of JSON schema matches anywhere in a text."""
        if not isinstance(expression, str):
            raise GrammarError("must be a regular expression", pointer=pointer, keyword="pattern")
        try:
            found = search(expression, self._layout.written, self._layout.written([(0, LAST)]))
        except GrammarError as error:
            raise GrammarError(error.message, pointer=pointer, keyword="pattern") from error
        return self._layout.quoted(found)

    def _number(self, schema: Any, pointer: str, kind: str) -> Pattern:
        if kind == "integer" and schema.get("multipleOf", 1) != 1:
            raise GrammarError("is supported as 1", pointer=pointer, keyword="multipleOf")
        bounds = {
            keyword: self._bound(schema[keyword], pointer, keyword, kind)
            for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
            if keyword in schema
        }
        if not bounds:
            return INTEGER if kind == "integer" else NUMBER
        # Of two lower bounds the greater counts, and of equal ones that which is left out itself.
        lows = [(bounds[k], k != "minimum") for k in ("minimum", "exclusiveMinimum") if k in bounds]
        highs = [(-bounds[k], k != "maximum") for k in ("maximum", "exclusiveMaximum") if k in bounds]
        low: Bound | None = max(lows) if lows else None
        top = max(highs) if highs else None
        high: Bound | None = None if top is None else (-top[0], top[1])
        if kind == "integer":
            least = None if low is None else low[0] + low[1]
            most = None if high is None else high[0] - high[1]
            is_empty = least is not None and most is not None and least > most
            pattern = union([]) if is_empty else integers_between(least, most)
        else:
            is_empty = low is not None and high is not None and (low[0], low[1] or high[1]) > (high[0], False)
            pattern = union([]) if is_empty else numbers_between(low, high)
        if is_empty:
            raise GrammarError("leave no number", pointer=pointer, keyword=" and ".join(bounds))
        return pattern

    def _bound(self, value: Any, pointer: str, keyword: str, kind: str) -> int:
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        limit = LARGEST_OPEN_BOUND if kind == "number" and keyword.startswith("exclusive") else 10**18 - 1
        if not is_whole or abs(value) > limit:
            message = f"is supported as a whole number of at most {limit}, got {value!r}"
            raise GrammarError(message, pointer=pointer, keyword=keyword)
        return int(value)

    def _counts(self, schema: Any, pointer: str, least: str, most: str) -> tuple[int, int | None]:
        found: list[int | None] = []
        for keyword in (least, most):
            value = schema.get(keyword)
            is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_COUNT
            if value is not None and not is_count:
                message = f"is supported as a count of at most {_MOST_COUNT}, got {value!r}"
                raise GrammarError(message, pointer=pointer, keyword=keyword)
            found.append(value)
        low, high = found[0] or 0, found[1]
        if high is not None and low > high:
            raise GrammarError(f"is above {most}", pointer=pointer, keyword=least)
        return low, high


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    classes: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    return isinstance(value, classes[kind])


def _are_apart(one: Any, other: Any, resolved: Callable[[Any], Any]) -> bool:
    """Whether no value can match both schemas, as far as can be told from types, values, and required properties."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    types, others = _types_of(one), _types_of(other)
    if types is not None and others is not None and not types & others:
        return True
    values, other_values = _values_of(one), _values_of(other)
    if values is not None and other_values is not None:
        return not any(value == different for value in values for different in other_values)
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    if types != {"object"} or others != {"object"}:
        return False
    return any(
        _are_apart(resolved(one["properties"].get(name)), resolved(other["properties"].get(name)), resolved)
        for name in shared
        if name in one.get("properties", {}) and name in other.get("properties", {})
    )


def _values_of(schema: Any) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _types_of(schema: Any) -> set[str] | None:
    values = _values_of(schema)
    if values is not None:
        found = {kind for value in values for kind in _TYPES if _is_of(value, kind)}
    elif "type" in schema:
        found = set(schema["type"] if isinstance(schema["type"], list) else [schema["type"]])
    elif "properties" in schema:
        found = {"object"}
    else:
        return None
    return found | {"integer"} if "number" in found else found
