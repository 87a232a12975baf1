"""Put a fault into a function, to see that a test notices it."""

import inspect
import textwrap


def broken(owner, name: str, right: str, wrong: str):
    """The function or method owner.name, with `right` in its source replaced by `wrong`."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(right) == 1, f"{name} does not contain {right!r} once"
    code = compile("from __future__ import annotations\n" + source.replace(right, wrong), name, "exec")
    functions = {}
    exec(code, vars(inspect.getmodule(owner)), functions)
    return functions[name]
