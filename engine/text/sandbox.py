"""The jinja2 environment for chat templates, which come from model files and so may be hostile.

jinja2's immutable sandbox keeps a template from reaching Python's internals. Here a rendering is
bounded as well: it may take `MAX_STEPS` steps (loop iterations and calls), make texts and lists of
`MAX_LENGTH` elements, and `MAX_TOTAL` elements altogether. What exceeds a bound raises SecurityError
before the memory is taken. Not bounded: the time of one filter or regular expression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_LENGTH = 16 << 20
MAX_TOTAL = 128 << 20
MAX_BITS = 4096
MAX_WIDTH = 4096
REMOVED_GLOBALS = ("lipsum",)
WIDENING = frozenset(
    {"batch", "center", "expandtabs", "filesizeformat", "indent", "ljust", "rjust", "slice", "tojson"}
    | {"truncate", "wordwrap", "zfill"}
)


class Budget:
    """What a rendering may still use."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.total = MAX_TOTAL

    def step(self) -> None:
        """Count one loop iteration or call."""
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")

    def make(self, length: int) -> None:
        """Count a text or list about to be made."""
        self.total -= length
        if length > MAX_LENGTH or self.total < 0:
            raise SecurityError(f"the template makes more than {MAX_LENGTH} characters or elements")


BUDGET: ContextVar[Budget] = ContextVar("budget")


def _budget() -> Budget:
    # Without a rendering, jinja2 is folding constants: each such expression has bounds of its own.
    return BUDGET.get(None) or Budget()


def bounded_iteration(values: Iterable[Any]) -> Iterator[Any]:
    """`values`, each counted as a step."""
    budget = _budget()
    for value in values:
        budget.step()
        yield value


class _Bounds(NodeTransformer):
    """Rewrites what the sandbox cannot intercept: loops to counted ones, `a ~ b` to `a|string + b|string`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja2's naming)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "bounded_iteration")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        first, *rest = [_filter(part, "string") for part in node.nodes]
        for part in rest:
            first = nodes.Add(first, part, lineno=node.lineno, environment=node.environment)
        return first


def _filter(node: nodes.Node, name: str) -> nodes.Expr:
    new = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    return new.set_environment(node.environment)  # type: ignore[return-value, arg-type]


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words for training: just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What Hugging Face's chat templates expect, with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "-"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
        for name in REMOVED_GLOBALS:
            self.globals.pop(name, None)
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.filters |= {"tojson": to_json, "join": join, "replace": replace, "format": format_text}
        self.filters |= {name: _narrow(self.filters[name]) for name in WIDENING if name in self.filters}
        self.filters["bounded_iteration"] = bounded_iteration

    def template(self, source: str) -> Template:
        """The template, rewritten so that it can be bounded. Raises TemplateSyntaxError."""
        code = self.compile(_Bounds().visit(self.parse(source)))
        return Template.from_code(self, code, self.make_globals(None))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the output of a template, macro or block."""
        budget = _budget()
        kept, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_LENGTH:
                budget.make(length)
            kept.append(piece)
        budget.make(length)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check the size of what an operator makes."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call, and check the methods that make long texts of short ones."""
        _budget().step()
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str):
            if name in WIDENING:
                _check_widths(args, kwargs)
            elif name == "join":
                return join(args[0] if args else (), owner)
            elif name == "replace":
                return replace(owner, *args, **kwargs)
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja2's sandboxed `str.format` and `format_map`, with a check of the widths."""
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, args, kwargs)
            return sandboxed(*args, **kwargs)

        return checked


def raise_exception(message: str) -> None:
    """Templates call this to refuse messages."""
    raise TemplateError(message)


def strftime_now(pattern: str) -> str:
    """The local time, as `strftime` writes it."""
    if len(pattern) > MAX_WIDTH or re.search(r"\d{4}", pattern):
        raise SecurityError("strftime_now has too long a pattern")
    return datetime.now().astimezone().strftime(pattern)


def to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (templates pass it by place or name)
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it is: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


def join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """jinja2's filter, its result's length checked."""
    items = list(bounded_iteration(value))
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, dict) else item[attribute] for item in items]
    texts = [str(item) for item in items]
    _budget().make(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def replace(text: str, old: str, new: str, count: int | None = None) -> str:
    """jinja2's filter and Python's method, the result's length checked."""
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _budget().make(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


def format_text(pattern: str, *args: Any, **kwargs: Any) -> str:
    """jinja2's filter: `pattern % arguments`."""
    _check_format(pattern, args, kwargs)
    return str(pattern) % (kwargs or args)


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing widths and counts that no prompt needs."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_widths(args, kwargs)
        return function(*args, **kwargs)

    return checked


def _check_widths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > MAX_WIDTH:
            raise SecurityError(f"a width of {value} in the template; at most {MAX_WIDTH}")
        if isinstance(value, Sized):
            _budget().make(len(value))


def _check_format(pattern: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse widths written in the pattern, and wherever one may come from an argument."""
    pattern = str(pattern)
    if re.search(r"\d{5}", pattern) or "*" in pattern or re.search(r"\{[^{}]*\{", pattern):
        raise SecurityError("the template formats with too great or a computed width")
    _budget().make(sum(len(str(value)) for value in (pattern, *args, *kwargs.values())))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(0, right)
        if bits > MAX_BITS and operator in {"*", "**"}:
            raise SecurityError(f"the template makes a number of more than {MAX_BITS} bits")
    elif operator == "*":
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, Sized) and isinstance(times, int):
                _budget().make(len(repeated) * max(0, times))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, (right,), {})
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _budget().make(len(left) + len(right))
