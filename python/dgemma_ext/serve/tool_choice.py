"""Which tools a request lets the model call, and which calls it holds it to: `tools`, `tool_choice`, `strict`,
`parallel_tool_calls`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma_ext.errors import GrammarError
from dgemma_ext.sampling import Grammar, ToolCalls
from dgemma_ext.serve import errors

_CHOICES = ("auto", "none", "required")
_WANTED = 'auto, none, required, or {"type": "function"} with a function\'s name'
_ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True)
class ToolChoice:
    """tools: as the chat template gets them; none where no tool may be called. choice: auto, required, or a tool's
    name. strict: for each tool whether its schema must be followed. parallel: whether several calls may be made."""

    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    strict: Sequence[bool] = ()
    parallel: bool = True

    @property
    def is_held(self) -> bool:
        """Whether a grammar holds the answer to its calls, whatever its text: not where all is left to the model."""
        return bool(self.tools) and (self.choice != "auto" or any(self.strict))

    def grammar(self, markers: Mapping[str, int], text: Grammar | None, **thinking: Any) -> Grammar:
        """What the answer must match. markers: the special tokens by their text. text: for answers without calls.

        A schema that is not strict and cannot be followed leaves the arguments free. Raises ApiError.
        """
        tools = [
            tool if strict or _is_followed(tool, markers) else _with_any_arguments(tool)
            for tool, strict in zip(self.tools, self.strict, strict=True)
        ]
        try:
            return ToolCalls(tools, self.choice, self.parallel, text if self.choice == "auto" else None, **thinking)
        except ValueError as error:
            raise errors.from_value_error(error, "tools") from error


def tool_choice_of(tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolChoice:
    """The choice of a request's fields. Raises ApiError naming the field."""
    if choice is None:
        choice = "auto"
    if isinstance(choice, Mapping):
        named = choice.get("function", choice) if choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, Mapping) else None
        if not isinstance(name, str):
            raise errors.bad_request(f"tool_choice must be {_WANTED}", "tool_choice")
        choice = name
        if choice not in [_function(tool).get("name") for tool in tools or ()]:
            raise errors.bad_request(f"tool_choice names {choice!a:.60}, which is none of the tools", "tool_choice")
    elif choice not in _CHOICES:
        raise errors.bad_request(f"tool_choice must be {_WANTED}", "tool_choice")
    elif choice == "required" and not tools:
        raise errors.bad_request("tool_choice is required, and there are no tools", "tool_choice")
    elif choice == "none":
        return ToolChoice()
    strict = [_strict(_function(tool), index) for index, tool in enumerate(tools or ())]
    return ToolChoice([_without_strict(tool) for tool in tools or ()], choice, strict, parallel is not False)


def _function(tool: Any) -> Mapping[str, Any]:
    """The part of a tool with its name: /v1/responses has it at the tool's own level."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _strict(function: Mapping[str, Any], index: int) -> bool:
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        field = f"tools[{index}].function.strict"
        raise errors.bad_request(f"{field} must be true or false", field)
    return strict is True


def _without_strict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool as a chat template gets it, which would tell the model of the field."""
    found = {name: value for name, value in tool.items() if name != "strict"}
    if isinstance(found.get("function"), Mapping):
        found["function"] = {name: value for name, value in found["function"].items() if name != "strict"}
    return found


def _is_followed(tool: Mapping[str, Any], markers: Mapping[str, int]) -> bool:
    try:
        ToolCalls([tool]).pattern(markers)
    except GrammarError:
        return False
    except ValueError:  # no tool, which is told with the others
        return True
    return True


def _with_any_arguments(tool: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "parameters": _ANY_ARGUMENTS}}
    return {**tool, "parameters": _ANY_ARGUMENTS}
