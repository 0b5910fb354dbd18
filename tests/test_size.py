"""No file and no function grows too long to be read at one sitting."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = [
    path
    for folder in ("sephjax", "configs", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LINES, FUNCTION_LINES = 400, 60


def docstring_lines(node):
    """Lines of a function's docstring: words are not counted against it."""
    first = node.body[0]
    there = ast.get_docstring(node) is not None
    return first.end_lineno - first.lineno + 1 if there else 0


def too_long(source, name):
    """What is too long in a file, one sentence each."""
    lines = len(source.splitlines())
    found = [f"{name} has {lines} lines"] if lines > LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            if length > FUNCTION_LINES:
                found.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    return found


def test_files_have_at_most_400_lines_and_functions_60():
    assert len(FILES) > 100
    found = [line for path in FILES for line in too_long(path.read_text(), path.relative_to(ROOT))]
    assert found == []


def test_the_rule_sees_what_is_too_long():
    body = "    x = 0\n"
    assert too_long("def f():\n" + 59 * body, "a.py") == []
    assert too_long("def f():\n" + 60 * body, "a.py") == ["a.py:1 f has 61 lines"]
    assert too_long("\n" * 401, "a.py") == ["a.py has 401 lines"]
