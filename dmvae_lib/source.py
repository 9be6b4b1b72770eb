"""Which source made a number, as digests: what is kept on disk is so told from what would be made now."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path

from dmvae_lib.errors import DMVAEError

FOLDER = Path(__file__).resolve().parent
PATHS = {
    ".".join(("dmvae_lib", *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
IMPORTED = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}  # what this process runs
# Followed into by no import: what makes no number, and what is in the configuration (budgets, the tables' rows).
ASIDE = {
    f"dmvae_lib.{name}"
    for name in (
        "errors",
        "files",
        "source",
        "models.saving",
        "paper",
        "profiles",
        "report",
        "runs",
        "experiments",
        "flower_experiments",
    )  # fmt: skip
}


def source_digests(*roots: str | Callable) -> dict[str, str]:
    """{module, or module:function: 12 hexadecimal digits} of the source that computes a number.

    roots: modules of the library, which count as a whole with all that they import from the library, and functions or
    classes, which stand for their modules; a function of a notebook or of the tables' modules (ASIDE) counts by itself.
    Comments, docstrings and layout do not count; other packages do not (run.json has their versions).

    Raises DMVAEError where the library's files have changed since they were imported: what ran would not be what they say.
    """
    found: dict[str, str] = {}
    todo = []
    for root in roots:
        root = root if isinstance(root, str) else inspect.unwrap(root.func if isinstance(root, partial) else root)
        if isinstance(root, str) or root.__module__ in IMPORTED.keys() - ASIDE:
            todo.append(root if isinstance(root, str) else root.__module__)
        elif inspect.isfunction(root):
            found[f"{root.__module__}:{root.__qualname__}"] = _function(root)
    while todo:
        module = todo.pop()
        if module in IMPORTED.keys() - ASIDE and module not in found:
            found[module] = _module(module)
            for node in ast.walk(ast.parse(IMPORTED[module])):
                if isinstance(node, ast.ImportFrom) and node.module:
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    todo += [alias.name for alias in node.names]
    return dict(sorted(found.items()))


def changed(digests: dict[str, str]) -> list[str]:
    """The names in `source_digests`' result whose source in the library is another now; a notebook's are passed over."""
    return [name for name, digest in digests.items() if name.startswith("dmvae_lib") and _now(name) != digest]


@cache
def python_digest(text: str) -> str:
    """12 hexadecimal digits of Python source as it runs: without comments, docstrings and layout."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a part of a statement, or a notebook's magic
        return _digest(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return _digest(ast.unparse(tree))


def _now(name: str) -> str:
    module, _, function = name.partition(":")
    if not function:
        return _module(module)
    found = getattr(import_module(module), function, None) if module in PATHS else None
    return "" if found is None else _function(found)


def _module(name: str) -> str:
    if name not in IMPORTED:
        return ""
    digest = python_digest(IMPORTED[name])
    if name in PATHS and python_digest(PATHS[name].read_text(encoding="utf-8")) != digest:
        raise DMVAEError(
            f"{PATHS[name]} has changed since it was imported; start Python or the notebook's kernel again, so that "
            "what runs is what is recorded."
        )
    return digest


def _function(function: Callable) -> str:
    try:
        return python_digest(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # typed into a shell: there is no source, the bytecode must do
        return _digest(f"{function.__code__.co_code.hex()} {function.__code__.co_consts} {function.__code__.co_names}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
