"""What tests read in a trainer's source: its functions by qualified name, and the places where they read the device."""

from __future__ import annotations

import ast

METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "masked_select"}
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


def host_reads(node: ast.AST) -> list[ast.AST]:
    """Where `node` calls .item() and its like, or float(), int() or bool(), any of which waits for the device."""
    calls = [x for x in ast.walk(node) if isinstance(x, ast.Call)]
    methods = [x for x in calls if isinstance(x.func, ast.Attribute) and x.func.attr in METHODS]
    return methods + [x for x in calls if isinstance(x.func, ast.Name) and x.func.id in CONVERSIONS]


def unmarked_host_reads(function: ast.FunctionDef, source: str) -> list[str]:
    """The lines of `function` that read the device without the comment that says so."""
    lines = source.splitlines()
    read = [lines[(x.end_lineno or x.lineno) - 1] for x in host_reads(function)]
    return [line.strip() for line in read if "# host sync" not in line]
