"""Whether a chat template's work and output are linear in its input, from its syntax tree alone.

Linear, because: strings are only joined where they are written, so nothing that is kept grows; a loop goes over data,
not over numbers; what a loop's body touches is the loop's own item, so nested loops walk a tree and never multiply.
Anything not listed here makes the answer no.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateError, nodes

_CALLS = frozenset({"strftime_now", "raise_exception"})
_FILTERS = frozenset({"trim", "length", "count", "string", "upper", "lower", "first", "last", "tojson", "default"})
_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true", "false"}
)
_LOOP_FACTS = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length"})
_PLAIN: tuple[type[nodes.Node], ...] = (
    nodes.Output, nodes.TemplateData, nodes.Const, nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand,
    nodes.And, nodes.Or, nodes.Not, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Continue, nodes.Break,
)  # fmt: skip
_JOINS: tuple[type[nodes.Node], ...] = (nodes.Add, nodes.Concat)


def is_bounded(environment: Environment, source: str) -> bool:
    """True when rendering takes time and memory linear in the variables. False also for what does not parse."""
    try:
        tree = environment.parse(source)
        return all(_statement(node, None, writes=False) for node in tree.body)
    except (TemplateError, RecursionError):
        return False


def _statement(node: nodes.Node, own: set[str] | None, writes: bool) -> bool:
    """Whether a node is harmless. `own`: the names that the innermost loop's body may touch, None outside of loops;
    `writes`: inside an Output, where strings may be joined."""
    if isinstance(node, nodes.For):
        return _loop(node, own)
    if isinstance(node, nodes.Assign):
        if not isinstance(node.target, nodes.Name) or not _statement(node.node, own, writes=False):
            return False
        if own is not None:
            own.add(node.target.name)
        return True
    if isinstance(node, nodes.Name):
        return own is None or node.name in own
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        return node.attr in _LOOP_FACTS
    if isinstance(node, nodes.Call):
        named = isinstance(node.node, nodes.Name) and node.node.name in _CALLS
        return named and all(isinstance(argument, nodes.Const) for argument in node.args) and not node.kwargs
    if isinstance(node, nodes.Filter):
        return _filter(node, own, writes)
    if isinstance(node, nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    if isinstance(node, nodes.Test):
        return node.name in _TESTS and not node.args and _children(node, own, writes=False)
    if isinstance(node, _JOINS) and not writes:
        return False
    if isinstance(node, (*_PLAIN, *_JOINS)):
        return _children(node, own, writes or isinstance(node, nodes.Output))
    return False


def _children(node: nodes.Node, own: set[str] | None, writes: bool) -> bool:
    return all(_statement(child, own, writes) for child in node.iter_child_nodes())


def _filter(node: nodes.Filter, own: set[str] | None, writes: bool) -> bool:
    if node.name not in _FILTERS or node.node is None or node.dyn_args or node.dyn_kwargs:
        return False
    for value in (*node.args, *(keyword.value for keyword in node.kwargs)):  # tojson(indent=…): a small constant
        if not isinstance(value, nodes.Const) or (isinstance(value.value, int) and not 0 <= value.value <= 8):
            return False
    if node.name == "tojson":  # JSON within JSON within JSON would double its backslashes every time
        return writes and _is_data(node.node, own)
    return _statement(node.node, own, writes=False)


def _is_data(node: nodes.Node, own: set[str] | None) -> bool:
    """A path, or an object written out of paths and constants."""
    if isinstance(node, nodes.Dict):
        return all(
            isinstance(pair.key, nodes.Const) and (isinstance(pair.value, nodes.Const) or _is_data(pair.value, own))
            for pair in node.items
        )
    return _is_path(node) and _statement(node, own, writes=False)


def _loop(node: nodes.For, own: set[str] | None) -> bool:
    data = node.iter
    if isinstance(data, nodes.Or) and isinstance(data.right, nodes.List) and not data.right.items:
        data = data.left  # "… or []"
    if node.recursive or node.else_ or not isinstance(node.target, nodes.Name) or not _is_path(data):
        return False
    if not _statement(data, own, writes=False):
        return False
    inner = {node.target.name}
    if node.test is not None and not _statement(node.test, inner, writes=False):
        return False
    return all(_statement(child, inner, writes=False) for child in node.body)


def _is_path(node: nodes.Node) -> bool:
    """messages, message['content'], message.tool_calls: data, looked up by constants."""
    if isinstance(node, nodes.Getattr):
        return _is_path(node.node)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const | nodes.Slice) and _is_path(node.node)
    return isinstance(node, nodes.Name)
