"""Find the functions in a trainer's source, and the places where they make the host wait for the device."""

from __future__ import annotations

import ast
import inspect

import vecsim_torch as vecsim

METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "synchronize"}
METHODS |= {"unique", "unique_consecutive"}
CONVERSIONS = {"float", "int", "bool"}
SHARED = vecsim.parse_args, vecsim.pick_run_dir, vecsim.make_environment, vecsim.score_in_gymnasium
SHARED += vecsim.RunLog, vecsim.Run, vecsim.play_checkpoint  # what reads the flags of all trainers


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """All functions by name: methods as "Class.method", nested functions as "outer.inner"."""
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


def flags_read(source: str) -> set[str]:
    """The flags that a trainer's source reads as args.NAME, and those that the functions it shares read."""
    sources = [source, *(inspect.getsource(x) for x in SHARED)]
    nodes = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    nodes = [node for node in nodes if isinstance(node.ctx, ast.Load)]
    return {node.attr for node in nodes if ast.unparse(node.value).split(".")[-1] == "args"}


def is_mask(index: ast.AST) -> bool:
    """Whether an index is plainly a mask: a comparison, ~x, x & y, or x | y with such a side (but not int | None).

    A mere name may hold a mask too; this lint cannot tell."""
    if isinstance(index, ast.BinOp) and isinstance(index.op, ast.BitOr):
        return is_mask(index.left) or is_mask(index.right)
    inverted = isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Invert)
    both = isinstance(index, ast.BinOp) and isinstance(index.op, ast.BitAnd)
    return isinstance(index, ast.Compare) or inverted or both


def host_reads(node: ast.AST) -> list[ast.AST]:
    """The parts of `node` that wait for the device.

    These are .item() and other METHODS, float(), int() and bool(), .any() and .all() as conditions, and x[x > 0]."""
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
    """The lines of `function` that wait for the device and lack the comment that says so."""
    lines = source.splitlines()
    read = [lines[(x.end_lineno or x.lineno) - 1] for x in host_reads(function)]
    return [line.strip() for line in read if "# host sync" not in line]
