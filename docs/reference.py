"""What Sphinx does not do by itself.

Formulas as MathML, alternative texts, the comments behind parameters.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing

from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from bigmodel_nb.headless.parameters import _comments
from bigmodel_nb.headless.report import mathml

LOGGER = logging.getLogger(__name__)


# Formulas


def _write(writer, node, display: str) -> None:
    made = mathml(node.astext(), display)
    if not made.startswith("<math") or "\\" in made:
        LOGGER.warning(
            "a formula that cannot be shown: %s", node.astext(), location=node
        )
    writer.body.append(made)
    raise nodes.SkipNode


def inline_math(writer, node) -> None:
    _write(writer, node, "inline")


def block_math(writer, node) -> None:
    # by the keyboard, to scroll a wide one
    reached = {"tabindex": "0", "role": "group", "aria-label": "formula"}
    writer.body.append(writer.starttag(node, "div", CLASS="formula", **reached))
    try:
        _write(writer, node, "block")
    finally:
        writer.body.append("</div>\n")


# Pictures


def _with_alternative_text(
    self, data, render=NbElementRenderer.render_image
) -> list[nodes.Element]:
    """myst-nb shows an image without the alternative text that stands beside it."""
    (image,) = render(self, data)
    image["alt"] = data.output_metadata.get(data.mime_type, {}).get("alt", "")
    if not image["alt"]:
        self.logger.warning(
            "a picture without alternative text", subtype="image", line=data.line
        )
    return [image]


class NoForeignImages(SphinxTransform):
    """A picture from another host, such as a badge, is its alternative text.

    So a page asks nobody for anything.
    """

    default_priority = 100

    def apply(self) -> None:
        for image in list(self.document.findall(nodes.image)):
            if "://" in image["uri"]:
                image.replace_self(nodes.Text(image.get("alt") or image["uri"]))


# Parameters


@dataclasses.dataclass
class Signature:
    """What the source says of a function or class."""

    # without `self`; None for a class that takes what its base takes
    arguments: ast.arguments | None
    rows: list[tuple[str, str, str]]  # name, type and comment of each parameter
    returns: tuple[str, str] | None = None  # type and comment


def _node(obj) -> tuple[ast.AST, dict[int, str]]:
    """The syntax tree of an object, and the comment on each of its lines."""
    source = textwrap.dedent(inspect.getsource(obj))
    return ast.parse(source).body[0], _comments(source)


def _plain_type(
    annotation: ast.expr | None, names: dict[str, object]
) -> tuple[ast.expr | None, str]:
    """A type, and what an `Annotated` one (of the command line) says of itself.

    `names` are those of the module, in which such a type may have one.
    """
    if (
        isinstance(annotation, ast.Subscript)
        and ast.unparse(annotation.value) == "Annotated"
    ):
        kind, said = annotation.slice.elts[0], annotation.slice.elts[1]
        return kind, next(
            (word.value.value for word in said.keywords if word.arg == "help"), ""
        )
    named = names.get(annotation.id) if isinstance(annotation, ast.Name) else None
    if typing.get_origin(named) is typing.Annotated:
        kind = inspect.formatannotation(named.__origin__)
        return ast.parse(kind, mode="eval").body, getattr(
            named.__metadata__[0], "help", ""
        )
    return annotation, ""


def _of_function(
    node: ast.FunctionDef,
    comments: dict[int, str],
    names: dict[str, object],
    bound: bool,
) -> Signature:
    arguments, rows = node.args, []
    if bound:
        arguments.args = arguments.args[1:]
    ends = {
        id(arg): arg.end_lineno
        for arg in ast.walk(arguments)
        if isinstance(arg, ast.arg)
    }
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [
        *zip(
            positional[len(positional) - len(arguments.defaults) :], arguments.defaults
        ),
        *zip(arguments.kwonlyargs, arguments.kw_defaults),
    ]
    ends.update({id(arg): default.end_lineno for arg, default in defaults if default})
    last = node.returns.end_lineno if node.returns else 0
    for star, arg in [
        *(("", each) for each in positional),
        ("*", arguments.vararg),
        *(("", each) for each in arguments.kwonlyargs),
        ("**", arguments.kwarg),
    ]:
        if arg is not None:
            arg.annotation, said = _plain_type(arg.annotation, names)
            line = ends[id(arg)]
            comment = comments.get(line, "") if line != last else ""
            rows.append(
                (
                    star + arg.arg,
                    ast.unparse(arg.annotation) if arg.annotation else "",
                    said or comment,
                )
            )
    returned = (
        (ast.unparse(node.returns), comments.get(last, "")) if node.returns else None
    )
    return Signature(arguments, rows, returned)


def _of_class(cls: type) -> Signature:
    node, comments = _node(cls)
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            names = vars(inspect.getmodule(cls))
            return dataclasses.replace(
                _of_function(member, comments, names, bound=True), returns=None
            )
    if not dataclasses.is_dataclass(cls):
        return Signature(None, [])
    # by name: a class may give a field of its base another default
    rows, arguments = {}, {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            node, comments = _node(base)
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = field.target.id
                    rows[name] = (
                        name,
                        ast.unparse(field.annotation),
                        comments.get(field.end_lineno, ""),
                    )
                    arguments[name] = ast.unparse(field)
    return Signature(
        ast.parse(f"def fields({', '.join(arguments.values())}): ...").body[0].args,
        list(rows.values()),
    )


def signature_of(what: str, obj) -> Signature | None:
    """What the source says of an object's parameters; None where there are none."""
    if what in ("class", "exception", "function", "method"):
        return _signature_of(what, obj)
    return None


@functools.cache  # asked for the signature, and again for the table
def _signature_of(what: str, obj) -> Signature | None:
    if what in ("class", "exception"):
        return _of_class(obj)
    node, comments = _node(obj)
    static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
    return _of_function(
        node,
        comments,
        vars(inspect.getmodule(obj)),
        bound=what == "method" and not static,
    )


def rst(text: str) -> str:
    """Prose with `names` in backticks, as docstrings hold it, as reStructuredText."""
    parts = re.split(r"`([^`]+)`", text)
    parts[::2] = [re.sub(r"([\\*_|])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [
        rf"\ :py:obj:`{part}`\ "
        if re.fullmatch(r"[A-Za-z_][\w.]*", part)
        else rf"\ ``{part}``\ "
        for part in parts[1::2]
    ]
    return "".join(parts)


def _table(found: Signature, what: str) -> list[str]:
    rows = [(f"``{name}``", kind, comment) for name, kind, comment in found.rows]
    if found.returns and found.returns[0] != "None":
        rows.append(("*returns*", *found.returns))
    if not rows:
        return []
    lines = ["", ".. list-table::", "   :header-rows: 1", "   :class: parameters", ""]
    for name, kind, comment in [(what, "type", "what it is"), *rows]:
        kind = rst(f"`{kind}`") if kind and kind != "type" else kind
        lines += [f"   * - {name}", f"     - {kind}", f"     - {rst(comment)}"]
    return [*lines, ""]


def document(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """The docstring as prose, and under it the table of parameters."""
    lines[:] = rst("\n".join(lines)).split("\n")
    if found := signature_of(what, obj):
        lines += _table(
            found, "field" if dataclasses.is_dataclass(obj) else "parameter"
        )


def sign(
    app: Sphinx, what: str, name: str, obj, options, signature, returned
) -> tuple[str, str | None] | None:
    """The signature as it stands in the source."""
    found = signature_of(what, obj)
    if not found or not found.arguments:
        return None
    returned = found.returns[0] if found.returns else None
    return f"({ast.unparse(found.arguments)})", returned


def skip(app: Sphinx, what: str, name: str, obj, skipped: bool, options) -> bool | None:
    """Members of other libraries are documented there.

    A method written in C names no module.
    """
    obj = getattr(obj, "fget", obj)  # of a property
    if inspect.isbuiltin(obj):
        return True
    module = getattr(getattr(obj, "__objclass__", obj), "__module__", None)
    return True if module and not module.startswith("bigmodel_nb") else None


def plain_lines(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """The parameters of a long signature are lines.

    Sphinx lists them as descriptions (`dd`) of nothing.
    """

    def lines(found: re.Match) -> str:
        return re.sub(
            r"<(/?)dd>",
            lambda tag: "</span>" if tag[1] else '<span class="line">',
            found[1],
        )

    if "body" in context:
        context["body"] = re.sub(
            r"<dl>\s*((?:<dd>.*</dd>\s*)+)</dl>", lines, context["body"]
        )


def setup(app: Sphinx) -> dict:
    NbElementRenderer.render_image = _with_alternative_text
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.add_transform(NoForeignImages)
    app.connect("autodoc-process-docstring", document)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", skip)
    app.connect("html-page-context", plain_lines)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
