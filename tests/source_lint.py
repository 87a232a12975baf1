"""What tests read in a trainer's source: its functions by qualified name, and the places where they read the device."""

from __future__ import annotations

import ast

METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "synchronize"}
CONVERSIONS = {"float", "int", "bool"}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Functions, methods ("Class.method") and nested functions ("outer.inner"); no two share a name."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = prefix + child.name
                inside = f"{name}."
                if isinstance(child, ast.FunctionDef):
                    assert name not in found, f"{name} is defined twice"
                    found[name] = child
            visit(child, inside)

    visit(ast.parse(source), "")
    return found


def is_mask(index: ast.AST) -> bool:
    """Whether an index is plainly boolean: a comparison, ~x, x & y, or x | y with such a side (`int | None` is a type). A name tells nothing."""
    if isinstance(index, ast.BinOp) and isinstance(index.op, ast.BitOr):
        return is_mask(index.left) or is_mask(index.right)
    inverted = isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Invert)
    return isinstance(index, ast.Compare) or inverted or (isinstance(index, ast.BinOp) and isinstance(index.op, ast.BitAnd))


def host_reads(node: ast.AST) -> list[ast.AST]:
    """Where `node` waits for the device: .item() and its like, float(), int() or bool(), .any() or .all() as a condition, x[x > 0]."""
    nodes = list(ast.walk(node))
    calls = [x for x in nodes if isinstance(x, ast.Call)]
    found = [x for x in calls if isinstance(x.func, ast.Attribute) and x.func.attr in METHODS]
    found += [x for x in calls if isinstance(x.func, ast.Name) and x.func.id in CONVERSIONS]
    for x in nodes:
        if isinstance(x, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            asked = [y for y in ast.walk(x.test) if isinstance(y, ast.Call) and isinstance(y.func, ast.Attribute)]
            found += [y for y in asked if y.func.attr in ("any", "all")]
        if isinstance(x, ast.Subscript):
            indices = x.slice.elts if isinstance(x.slice, ast.Tuple) else [x.slice]
            found += [x for index in indices if is_mask(index)]
    return found


def unmarked_host_reads(function: ast.FunctionDef, source: str) -> list[str]:
    """The lines of `function` that read the device without the comment that says so."""
    lines = source.splitlines()
    read = [lines[(x.end_lineno or x.lineno) - 1] for x in host_reads(function)]
    return [line.strip() for line in read if "# host sync" not in line]
