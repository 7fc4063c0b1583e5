"""In which form a chat template expects the messages, as its syntax tree shows.

Templates do not declare whether a message's content is a string or a list of parts, nor whether
the arguments of a tool call are an object or JSON text. A wrong guess renders Python's spelling of
a list into the prompt, so we look at what the template does with these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard

from jinja2 import meta, nodes

ContentForm = Literal["text", "parts", "either"]


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """The form of messages that one template expects.

    content            the form of a message's content: a string, a list of parts, or either
    arguments_as_text  whether a tool call's arguments must be JSON text, which the template prints
    variables          names of the variables that the template reads
    """

    content: ContentForm
    arguments_as_text: bool
    variables: frozenset[str]


def traits_of(tree: nodes.Template) -> TemplateTraits:
    return TemplateTraits(
        content=_content_form(tree),
        arguments_as_text=_takes_arguments_as_text(tree),
        variables=frozenset(meta.find_undeclared_variables(tree)),
    )


def _content_form(tree: nodes.Template) -> ContentForm:
    content = _Field("content", tree)
    loops = any(content.is_read_by(loop.iter) for loop in tree.find_all(nodes.For))
    of_items = [access.node for access in tree.find_all(nodes.Getitem)]
    of_items += [access.node for access in tree.find_all(nodes.Getattr)]
    indexed = any(_is_item(node) and content.is_read_by(node.node) for node in of_items)
    if not (loops or indexed):
        return "text"
    tests = (test for test in tree.find_all(nodes.Test) if test.name == "string")
    return "either" if any(content.is_read_by(test.node) for test in tests) else "parts"


def _is_item(node: nodes.Expr) -> TypeGuard[nodes.Getitem]:
    """Whether this is `something[0]`."""
    if not isinstance(node, nodes.Getitem) or not isinstance(node.arg, nodes.Const):
        return False
    return isinstance(node.arg.value, int)


def _takes_arguments_as_text(tree: nodes.Template) -> bool:
    """True where arguments are only ever printed or joined to a string (DeepSeek V3)."""
    arguments = _Field("arguments", tree)
    if not arguments.is_mentioned:
        return False
    as_object: list[nodes.Node | None] = [loop.iter for loop in tree.find_all(nodes.For)]
    filters = tree.find_all(nodes.Filter)
    as_object += [each.node for each in filters if each.name in {"tojson", "items", "dictsort"}]
    tests = tree.find_all(nodes.Test)
    as_object += [test.node for test in tests if test.name in {"mapping", "string"}]
    methods = [call.node for call in tree.find_all(nodes.Call)]
    as_object += [
        method.node
        for method in methods
        if isinstance(method, nodes.Getattr) and method.attr in {"items", "keys", "get"}
    ]
    return not any(arguments.is_read_by(node) for node in as_object)


class _Field:
    """Recognises the expressions whose value is a certain field, directly or through a variable."""

    def __init__(self, name: str, tree: nodes.Template) -> None:
        self._name = name
        self._variables: set[str] = set()
        accesses = tree.find_all((nodes.Getattr, nodes.Getitem))
        self.is_mentioned = any(self._is_access(access) for access in accesses)
        macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        # A variable may be set from another one that is set further on; repeat until none is new.
        while self._collect(tree, macros):
            continue

    def is_read_by(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._variables
        if isinstance(node, nodes.Filter):
            return self.is_read_by(node.node)
        if isinstance(node, nodes.CondExpr):
            return self.is_read_by(node.expr1) or self.is_read_by(node.expr2)
        if isinstance(node, (nodes.Or, nodes.And)):
            return self.is_read_by(node.left) or self.is_read_by(node.right)
        return self._is_access(node)

    def _is_access(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == self._name
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == self._name
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            keys = [each.value for each in node.args[:1] if isinstance(each, nodes.Const)]
            return node.node.attr == "get" and keys == [self._name]
        return False

    def _collect(self, tree: nodes.Template, macros: dict[str, nodes.Macro]) -> bool:
        """Add variables and macro parameters that hold the field; True if one is new."""
        before = len(self._variables)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and self.is_read_by(assign.node):
                self._variables.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is None:
                continue
            for parameter, argument in zip(macro.args, call.args, strict=False):
                if self.is_read_by(argument):
                    self._variables.add(parameter.name)
        return len(self._variables) > before
