"""The Jinja environment of chat templates, which are untrusted code from a checkpoint.

It renders what transformers renders: the same sandbox, options, filters and functions. Beyond
that, it bounds the work and the memory of a template. Loops and calls are counted, and operations
that make text longer fail before they allocate it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["MAX_TEMPLATE_CHARACTERS", "Rendering", "compile_template", "literal_text", "rendering"]

MAX_TEMPLATE_CHARACTERS = 2**18  # the longest published templates have about 30,000
MAX_STEPS = 2_000_000  # iterations of loops, and calls
MAX_CHARACTERS = 2**24  # of any text that a template makes
MAX_TOTAL_CHARACTERS = 2**28  # of all of them together
MAX_INTEGER_BITS = 4096
MAX_WIDTH = 10_000  # to pad or indent text to
# Names that no template can spell, so that no template can use or replace them.
COUNTED, CONCATENATED, EMITTED = "loop over", "concatenated with ~", "characters emitted"
# Filters that make text of a list or a mapping, which may hold one object many times.
TEXT_FILTERS = (
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "lower", "pprint"),
    *("replace", "safe", "string", "striptags", "title", "trim", "truncate", "upper", "urlencode"),
    *("urlize", "wordcount", "wordwrap", "xmlattr"),
)
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*(\d{5}|\{)")


class Rendering:
    """The state of one call of a template.

    Args:
        answer_markers: characters to write before and after each ``{% generation %}`` block; None
            writes none.
        escaped_markers: characters that ``tojson`` must not escape.
    """

    def __init__(
        self, *, answer_markers: tuple[str, str] | None = None, escaped_markers: str = ""
    ) -> None:
        self.answer_markers = answer_markers
        self.escaped_markers = escaped_markers
        self.steps = 0
        self.characters = 0

    def step(self) -> None:
        """Count an iteration or a call.

        Raises:
            SecurityError: there were too many.
        """
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} loop iterations and calls")

    def spend(self, characters: int) -> None:
        """Count text that is about to be made.

        Raises:
            SecurityError: there is too much.
        """
        self.characters += characters
        if characters > MAX_CHARACTERS or self.characters > MAX_TOTAL_CHARACTERS:
            raise SecurityError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")


_current: ContextVar[Rendering | None] = ContextVar("rendering", default=None)


@contextmanager
def rendering(state: Rendering) -> Iterator[None]:
    """Make ``state`` that of the templates that render in this context."""
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)


def compile_template(source: str) -> Template:
    """Compile a template.

    Raises:
        TemplateError: it has a syntax error or is too long. Templates that are nested too deeply
            raise other errors.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError(
            f"it has {len(source):,} characters; at most {MAX_TEMPLATE_CHARACTERS:,} are allowed"
        )
    tree = _Bounds().visit(_ENVIRONMENT.parse(source))
    with rendering(Rendering()):  # constants are computed at compile time
        code = _ENVIRONMENT.compile(tree)
    return Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def literal_text(source: str) -> str:
    """Return the text and the string constants of a template, separated by null characters.

    Raises:
        TemplateError: see :func:`compile_template`.
    """
    tree = _ENVIRONMENT.parse(source)
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    constants = (node.value for node in tree.find_all(nodes.Const))
    return "\0".join(sorted(texts | {value for value in constants if isinstance(value, str)}))


class _Bounds(NodeTransformer):
    """Rewrite a syntax tree so that its loops are counted and its concatenations checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 -- named after the node
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, COUNTED, [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 -- named after the node
        self.generic_visit(node)
        parts = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(parts, CONCATENATED, [], [], None, None).set_lineno(node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802 -- named after the node
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        constant = nodes.Const(size).set_lineno(node.lineno)
        count = nodes.Filter(constant, EMITTED, [], [], None, None)
        count.set_lineno(node.lineno)
        node.nodes.append(count)
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on operators and calls."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after checking the size of its result."""
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_characters(len(left) + len(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and isinstance(one, str | bytes | list | tuple):
                    _check_characters(len(one) * max(other, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_size(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a safe version of the method ``str.format``, or None for other objects."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 -- as in jinja2, for keyword arguments of any name
        """Count a call, check the size of its result, and make it."""
        if (state := _current.get()) is not None:
            state.step()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            _check_method(text, getattr(__obj, "__name__", ""), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check a call of a method of a string that may make it longer."""
    if name == "translate":
        raise SecurityError("str.translate is not allowed")
    if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        for width in (*args, *kwargs.values()):
            _check_width(width, len(text))
    elif name == "replace" and len(args) > 1:
        _check_replace(text, args[0], args[1])
    elif name == "join" and args:
        _join_checked(text, args[0] if isinstance(args[0], Sized) else ())


def _check_characters(count: int) -> None:
    (_current.get() or Rendering()).spend(count)


def _check_size(value: object) -> None:
    """Check the size of the text of a value."""
    if isinstance(value, str):
        _check_characters(len(value))
        return
    if not isinstance(value, list | tuple | dict):
        return
    size, stack = 0, [value]
    while stack:
        part = stack.pop()
        size += 2
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, dict):
            stack += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            stack += part
        if size > MAX_CHARACTERS:
            break
    _check_characters(size)


def _check_bits(count: int) -> None:
    if count > MAX_INTEGER_BITS:
        raise SecurityError(f"it computes an integer of more than {MAX_INTEGER_BITS:,} bits")


def _check_width(width: object, repeats: int) -> None:
    if isinstance(width, int):
        if width > MAX_WIDTH:
            raise SecurityError(f"it pads text to {width:.0e} characters")
        _check_characters(width * max(repeats, 1))


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("it formats text to a width of five digits or more")


def _check_replace(text: str, old: object, new: object) -> None:
    old, new = str(old), str(new)
    found = text.count(old) if len(text) * len(new) > MAX_CHARACTERS else 0
    _check_characters(len(text) + found * len(new))


def _join_checked(separator: str, values: Any) -> None:
    total = 0
    for value in values:
        if not isinstance(value, str):
            _check_size(value)
        total += len(separator) + (len(value) if isinstance(value, str) else 0)
        if total > MAX_CHARACTERS:
            break
    _check_characters(total)


def _counted(value: Any) -> Any:
    """Return an iterable that counts its iterations, with the length of ``value`` if it has one."""
    if isinstance(value, jinja2.Undefined):
        return value  # its own error names the variable
    return _SizedLoop(value) if isinstance(value, Sized) else _count(value)


class _SizedLoop:
    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _count(self._values)


def _count(values: Any) -> Iterator[Any]:
    state = _current.get()
    for value in values:
        if state is not None:
            state.step()
        yield value


@jinja2.pass_context  # so that it is not computed when the template is compiled
def _emitted(context: Context, characters: int) -> str:
    del context
    _check_characters(characters)
    return ""


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Check a value that is written to the text."""
    del context
    _check_size(value)
    return value


def _concatenated(values: list[Any]) -> str:
    for value in values:
        if not isinstance(value, str):
            _check_size(value)
    texts = [str(value) for value in values]
    _check_characters(sum(map(len, texts)))
    return "".join(texts)


def _bounded_filters(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the filters that may make much of little, with checks."""

    def center(value: str, width: int = 80) -> str:
        _check_width(width, 1)
        return str(filters["center"](value, width))

    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        size = width if isinstance(width, int) else len(width)
        _check_width(size, s.count("\n") + 1)
        return str(filters["indent"](s, width, first, blank))

    @jinja2.pass_eval_context
    def join(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        value = list(value)
        if attribute is None:
            _join_checked(str(d), value)
        return filters["join"](eval_ctx, value, d, attribute)

    @jinja2.pass_eval_context
    def replace(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> str:
        _check_replace(str(s), old, new)
        return str(filters["replace"](eval_ctx, s, old, new, count))

    def format_(value: str, *args: Any, **kwargs: Any) -> str:
        _check_format(str(value))
        return str(filters["format"](value, *args, **kwargs))

    def slices(value: Any, slices: int, fill_with: Any = None) -> Any:
        _check_width(slices, 1)
        return filters["slice"](value, slices, fill_with)

    def batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
        _check_width(linecount, 1)
        return filters["batch"](value, linecount, fill_with)

    def of_text(function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks the size of its input first."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for value in args[:2]:  # the first may be the context
                if not isinstance(value, str):
                    _check_size(value)
            return function(*args, **kwargs)

        return checked

    bounded: dict[str, Callable[..., Any]] = {
        "center": center,
        "indent": indent,
        "join": join,
        "replace": replace,
        "format": format_,
        "slice": slices,
        "batch": batch,
        "tojson": _tojson,
        COUNTED: _counted,
        CONCATENATED: _concatenated,
        EMITTED: _emitted,
    }
    for name in TEXT_FILTERS:
        bounded[name] = of_text(bounded.get(name, filters[name]))
    return bounded


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers does, whose filter escapes no HTML, unlike Jinja's own."""
    _check_width(indent, 1)
    _check_size(x)
    text = json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _check_characters(len(text))
    state = _current.get()
    for marker in "" if state is None or not ensure_ascii else state.escaped_markers:
        text = text.replace(f"\\u{ord(marker):04x}", marker)
    return text


class _Generation(Extension):
    """The tag ``{% generation %}``, which surrounds what the model is to generate."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Parse the block up to ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_render"), [], [], body)
        block.set_lineno(line)
        return block

    def _render(self, caller: Macro) -> str:
        state = _current.get()
        before, after = ("", "") if state is None else state.answer_markers or ("", "")
        return before + str(caller()) + after


class _Dict:
    """The function ``dict``, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of a variable
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores the name {name!r:.60}, which begins with an underscore")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 -- the name that templates use
    return datetime.now().strftime(format)  # local time, as in transformers


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finalize,
    )
    environment.filters.update(_bounded_filters(dict(environment.filters)))
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


_ENVIRONMENT = _environment()
