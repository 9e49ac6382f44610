"""What an answer must match, as OpenAI (`response_format`, `text.format`) and vLLM (`structured_outputs`) spell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling import Choice, Grammar, JsonSchema, Regex
from dgemma_ext.serve import errors
from dgemma_ext.serve.protocol.common import GeneratingBody
from dgemma_ext.serve.service import Service
from dgemma_ext.serve.tool_choice import ToolChoice

_BUDGET = "thinking_token_budget"
_FORMATS = "text, json_object or json_schema"
_STRUCTURES = ("json", "json_object", "regex", "choice")


@dataclass(frozen=True)
class Wanted:
    """A grammar, and the field that asks for it."""

    field: str
    grammar: Grammar


async def grammar_of(
    service: Service,
    body: GeneratingBody,
    field: str,
    response_format: Any,
    tools: ToolChoice | None = None,
    thinks: bool | None = None,
) -> Grammar | None:
    """The grammar of a request, compiled, or None.

    field: the name of `response_format` in this interface, whose json_schema may stand in an object of that name or
    beside its type. tools: those that may be called, which a format of the text does not rule out. thinks: whether the
    request turns thinking on.
    Raises ApiError naming the field, and for a schema the JSON pointer and the keyword that cannot be followed.
    """
    formatted = _of_format(field, response_format)
    structured = _of_structure(body.structured_outputs)
    if formatted is not None and structured is not None:
        raise errors.bad_request(f"{field} and structured_outputs both say what the answer must match", field)
    wanted = formatted or structured
    budget, has_tools = body.thinking_token_budget, tools is not None and bool(tools.tools)
    if budget is not None and wanted is None and not has_tools:
        wanted = Wanted(_BUDGET, Regex("(?s:.*)"))  # a thought is bounded where a grammar holds the answer behind it
    calls = tools is not None and has_tools and (tools.is_held or wanted is not None or budget is not None)
    if wanted is None and not calls:
        return None
    at_fault = wanted.field if wanted is not None else "tool_choice" if budget is None else _BUDGET
    if service.model.device.type != "cpu":
        raise errors.not_supported(at_fault, f"{at_fault} is for models on a CPU; there are no GPU kernels yet")
    # In another thread, where it delays nobody; the scheduler then finds it among those that are kept.
    grammar = None
    if wanted is not None:
        await _compiled(service, wanted, thinks)
        grammar = wanted.grammar.with_thinking_budget(budget)
    if calls and tools is not None:
        markers = service.tokenizer.markers
        grammar = await service.in_thread("tools", tools.grammar, markers, grammar, thinking_budget=budget)
        await _compiled(service, Wanted("tools", grammar), thinks)
    return grammar


async def _compiled(service: Service, wanted: Wanted, thinks: bool | None) -> None:
    try:
        await service.in_thread(wanted.field, service.model.compile, wanted.grammar, bool(thinks))
    except errors.ApiError as error:
        message = f"{wanted.field}: {error.message}"
        raise errors.bad_request(message, wanted.field, "invalid_grammar") from error


def _of_format(field: str, value: Any) -> Wanted | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Wanted(field, JsonSchema({"type": "object"}))
    if kind == "json_schema":
        holder = value.get("json_schema", value)
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        if not isinstance(schema, Mapping | bool):
            raise errors.bad_request(f"{field} has no schema, an object", field)
        return _wanted(field, JsonSchema, schema)
    raise errors.bad_request(f"{field} must be an object with the type {_FORMATS}", field)


def _of_structure(value: Any) -> Wanted | None:
    if value is None:
        return None
    given = {name: one for name, one in value.items() if one is not None} if isinstance(value, Mapping) else {}
    unknown = sorted(set(given) - set(_STRUCTURES))
    if unknown:
        field = f"structured_outputs.{unknown[0]}"
        raise errors.not_supported(field, f"{field} is not known here; {', '.join(_STRUCTURES)} are")
    if len(given) != 1:
        raise errors.bad_request(
            f"structured_outputs must be an object with one of {', '.join(_STRUCTURES)}", "structured_outputs"
        )
    ((name, wish),) = given.items()
    field = f"structured_outputs.{name}"
    if name == "json":
        if not isinstance(wish, Mapping | str | bool):
            raise errors.bad_request(f"{field} must be a schema, an object or its text", field)
        return _wanted(field, JsonSchema, wish)
    if name == "json_object":
        if wish is not True:
            raise errors.bad_request(f"{field} may only be true", field)
        return Wanted(field, JsonSchema({"type": "object"}))
    return _wanted(field, Regex if name == "regex" else Choice, wish)


def _wanted(field: str, kind: type[Grammar], *arguments: Any) -> Wanted:
    try:
        return Wanted(field, kind(*arguments))
    except (ValueError, GrammarError) as error:
        raise errors.bad_request(f"{field}: {error}", field, "invalid_grammar") from error
