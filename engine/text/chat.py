"""Chat messages to a prompt, by the template in the model file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from numoe.engine.errors import InputError, ModelFileError
from numoe.engine.text.sandbox import BUDGET, Budget, ChatEnvironment
from numoe.engine.text.vocabulary import SpecialIds, token_text

KEY = "tokenizer.chat_template"
TOOL_USE = "tool_use"


class ChatTemplate:
    """A file's chat template; immutable, and safe to use from several threads.

    Most templates write BOS themselves, so a rendered prompt is tokenized with
    `Tokenizer.encode_chat`, which adds one only where it is missing.
    """

    def __init__(
        self, source: str, *, tool_source: str | None = None, bos_token: str = "", eos_token: str = ""
    ) -> None:
        """`tool_source`, if given, is used in place of `source` when there are tools.

        Raises ModelFileError for a template that cannot be parsed.
        """
        self.source = source
        environment = ChatEnvironment()
        self._template = _compile(environment, source)
        self._tool_template = _compile(environment, tool_source) if tool_source else self._template
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """The file's template, None if it has none.

        A variant named tool_use (`tokenizer.chat_template.tool_use`) serves requests with tools.
        Raises ModelFileError for a template that is not text or cannot be parsed.
        """
        source, tools = metadata.get(KEY), metadata.get(f"{KEY}.{TOOL_USE}")
        source = metadata.get(f"{KEY}.default", tools) if source is None else source
        if source is None:
            return None
        if not isinstance(source, str) or not isinstance(tools, str | None):
            raise ModelFileError(f"{KEY} is not text")
        ids = SpecialIds.from_metadata(metadata)
        bos, eos = token_text(metadata, ids.bos), token_text(metadata, ids.eos)
        return cls(source, tool_source=tools, bos_token=bos, eos_token=eos)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages` (each with "role" and "content"), up to where the model goes on.

        `variables` are the template's own, such as enable_thinking. Raises InputError with the
        template's message if it refuses the messages, fails, or exceeds the bounds of `sandbox`.
        """
        template = self._tool_template if tools else self._template
        given = self._variables | variables
        given |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        token = BUDGET.set(Budget())
        try:
            return template.render(given)
        except TemplateError as error:
            raise InputError(f"chat template: {error.message}") from error
        except Exception as error:
            raise InputError(f"chat template: {type(error).__name__}: {error}") from error
        finally:
            BUDGET.reset(token)


def _compile(environment: ChatEnvironment, source: str) -> Template:
    try:
        return environment.template(source)
    except TemplateSyntaxError as error:
        raise ModelFileError(f"{KEY}, line {error.lineno}: {error.message}") from error
    except (RecursionError, MemoryError) as error:
        raise ModelFileError(f"{KEY} is nested too deeply") from error
