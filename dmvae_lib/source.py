"""Which source a computation runs, as digests: what was kept on disk can so be told from what would be made now."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from dmvae_lib.errors import DMVAEError

LIBRARY = __name__.partition(".")[0]
FOLDER = Path(__file__).resolve().parent
PLUMBING = {f"{LIBRARY}.{name}" for name in ("errors", "files", "source")}  # they move numbers, and make none
# Modules that hold the rows of tables beside functions: there each function counts by itself, and a new row changes none.
BY_FUNCTION = {f"{LIBRARY}.{name}" for name in ("experiments", "flower_experiments")}
CODE = (FunctionType, type, ModuleType)


def _files() -> Iterator[tuple[str, Path]]:
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        yield ".".join((LIBRARY, *(part for part in parts if part != "__init__"))), path


PATHS = dict(_files())
IMPORTED = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}  # what this process runs


def source_digests(*roots: Callable | ModuleType) -> dict[str, str]:
    """{name of a module or of module:function: 12 hexadecimal digits} for all source that `roots` reach.

    Followed are the names that a function uses and the imports of the library's modules: into the library, and into the
    roots' own modules or notebook, not into other packages (their versions stand in run.json). Constants that a function
    uses count by their values; comments, docstrings and layout do not count. A module of the library counts as a whole,
    so the digests may change where no number would. What they do not see: methods called on an argument (a model's
    class is reached through what makes it), imports inside functions, and data, which has a fingerprint of its own.

    Raises DMVAEError where the library's files have changed since they were imported: what ran would not be what they
    say.
    """
    found: dict[str, str] = {}
    seen: dict[int, object] = {}
    todo = [_code_of(root) for root in roots]
    homes = {root.__module__ for root in todo if not isinstance(root, ModuleType)}
    while todo:
        item = todo.pop()
        if not isinstance(item, CODE):
            continue
        module = item.__name__ if isinstance(item, ModuleType) else item.__module__ or ""
        ours = module.partition(".")[0] == LIBRARY
        if ours and module not in BY_FUNCTION and not isinstance(item, ModuleType):
            item = sys.modules[module]
        if id(item) in seen or module in PLUMBING or not (ours or module in homes):
            continue
        seen[id(item)] = item
        if isinstance(item, ModuleType):
            found[module] = _current(module, "")
            todo += map(_code_of, vars(item).values())
            continue
        unit = item.__qualname__.partition(".")[0]
        if not ours:
            found[f"{module}:{item.__qualname__}"] = _foreign(item)
        elif _stands_in(module, unit):
            found[f"{module}:{unit}"] = _current(module, unit)
        for name, value in _globals(item):
            if not isinstance(value := _code_of(value), CODE) and (text := _constant(value)):
                found[f"{module}:{name}"] = _current(module, name) if _stands_in(module, name) else _digest(text)
            todo.append(value)
        todo += map(_code_of, _inside(item))
    return dict(sorted(found.items()))


def changed(digests: dict[str, str]) -> list[str]:
    """The names in `source_digests`' result whose source in the library is another now; other modules are passed over."""
    return [
        name
        for name, digest in digests.items()
        if name.partition(".")[0] == LIBRARY and _imported(*name.partition(":")[::2]) != digest
    ]


def python_digest(text: str) -> str:
    """12 hexadecimal digits of Python source as it runs: without comments, docstrings and layout."""
    try:
        return _digest(_plain(ast.parse(text)))
    except SyntaxError:  # a part of a statement, or a notebook's magic
        return _digest(text)


def _code_of(value: object) -> object:
    """The function behind a partial, a method or functools.cache; the class of any other callable object."""
    while isinstance(value, partial):
        value = value.func
    value = getattr(value, "__func__", value)
    if not callable(value) or isinstance(value, (FunctionType, type)):
        return value
    return getattr(value, "__wrapped__", None) or type(value)


def _inside(item: FunctionType | type) -> list:
    """A class's attributes and bases; what a function holds of the function around it."""
    if isinstance(item, type):
        return [*vars(item).values(), *item.__bases__]
    return [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]


def _globals(item: FunctionType | type) -> Iterator[tuple[str, object]]:
    if isinstance(item, type):
        return
    names, attributes = _names(item.__code__)
    for name in sorted(names & item.__globals__.keys()):
        value = item.__globals__[name]
        if isinstance(value, ModuleType) and value.__name__ in BY_FUNCTION:
            yield from ((other, vars(value)[other]) for other in sorted(attributes & vars(value).keys()))
        else:
            yield name, value


def _constant(value: object) -> str:
    """Numbers, texts and tables of them as text; nothing for other objects."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return ""


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name of the enclosing function that has no value yet
        return False
    return True


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals and the attributes that it reads."""
    names, attributes = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            names, attributes = names | inner[0], attributes | inner[1]
    return names, attributes


def _current(module: str, unit: str) -> str:
    digest, path = _imported(module, unit), PATHS.get(module)
    if path is not None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != IMPORTED[module] and _unit_digest(text, unit) != digest:
            raise DMVAEError(
                f"{path} has changed since it was imported; start Python or the notebook's kernel again, so that what "
                "runs is what is recorded."
            )
    return digest


@cache
def _imported(module: str, unit: str) -> str:
    return _unit_digest(IMPORTED.get(module, ""), unit)


@cache
def _stands_in(module: str, unit: str) -> bool:
    return module in IMPORTED and bool(_unit(ast.parse(IMPORTED[module]), unit))


def _unit(tree: ast.Module, unit: str) -> list[ast.stmt]:
    """The function, class or constant of that name at the top of a module."""
    found = []
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        names = [getattr(name, "id", None) for name in targets]
        if unit in names or isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == unit:
            found.append(node)
    return found


def _unit_digest(text: str, unit: str) -> str:
    """Of a module's text, or of one thing that stands at its top."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return _digest(text)
    if unit:
        tree.body = _unit(tree, unit)
    return _digest(_plain(tree))


def _foreign(item: FunctionType | type) -> str:
    """Of a function or class outside the library, for example a notebook's."""
    try:
        return python_digest(textwrap.dedent(inspect.getsource(item)))
    except (OSError, TypeError):  # typed into a shell: there is no source, the bytecode must do
        functions = (
            [item] if isinstance(item, FunctionType) else [f for f in vars(item).values() if inspect.isfunction(f)]
        )
        return _digest("".join(_bytecode(function.__code__) for function in functions))


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _plain(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
