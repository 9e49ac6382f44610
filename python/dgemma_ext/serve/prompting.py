"""What a request says to the chat template: tools, thinking, other variables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_ext.checkpoint import Tokenizer
from dgemma_ext.engine import PromptOptions
from dgemma_ext.serve import errors

# Efforts that turn thinking off; "instant" is Mercury's.
_NO_EFFORT = ("none", "instant", "minimal")
_BEFORE = ("system", "developer")
_THINKING = "enable_thinking"


def options_of(
    tools: Sequence[Mapping[str, Any]] | None, effort: str | None, variables: Mapping[str, Any] | None
) -> PromptOptions:
    """A prompt's options. The template's own variable decides about thinking before the effort does."""
    others = dict(variables or {})
    thinks = others.pop(_THINKING, None)
    if thinks is None and effort is not None:
        thinks = effort not in _NO_EFFORT
    if thinks is not None and not isinstance(thinks, bool):
        field = f"chat_template_kwargs.{_THINKING}"
        raise errors.bad_request(f"{field} must be true or false", field)
    return PromptOptions(tools or None, thinks, others or None)


def messages_by_roles(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Mapping[str, Any]]:
    """The messages as the template expects them: what comes before the conversation is one system message.

    A developer's message stays one where the template knows developers and it stands alone.
    """
    known = tokenizer.chat_template is not None and "developer" in tokenizer.chat_template.source
    before = list(itertools.takewhile(lambda one: one.get("role") in _BEFORE, messages))
    if len(before) > 1 and all(isinstance(one.get("content"), str) for one in before):
        joined = "\n\n".join(one["content"] for one in before)
        messages = [{"role": "system", "content": joined}, *messages[len(before) :]]
    if known:
        return list(messages)
    return [{**one, "role": "system"} if one.get("role") == "developer" else one for one in messages]
