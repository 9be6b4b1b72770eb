"""Two rooms: the core knows nothing of the paper's, no module needs itself, and importing the core costs next to nothing."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dmvae_lib").rglob("*.py"))
}
CORE = [name for name in MODULES if not f"{name}.".startswith("dmvae_lib.paper.")]


def imports(name: str, everywhere: bool) -> set[str]:
    """The library's modules that a module imports when it is imported; or also in its functions, and for its types."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.ImportFrom) and part.module and not part.level:
                names = {f"{part.module}.{alias.name}" for alias in part.names}
                found.update(names & MODULES.keys() or {part.module})
            elif isinstance(part, ast.Import):
                found.update(alias.name for alias in part.names)
            later = (
                isinstance(part, ast.FunctionDef) or isinstance(part, ast.If) and "TYPE_CHECKING" in ast.dump(part.test)
            )
            if everywhere or not later:
                walk(part)

    walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return (found & MODULES.keys()) - {name}


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_of_the_paper(name):
    assert not [other for other in imports(name, everywhere=True) if other.startswith("dmvae_lib.paper")]


def test_no_module_needs_itself():
    needs = {name: imports(name, everywhere=True) for name in MODULES}
    for name in MODULES:
        seen, todo = set(), list(needs[name])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += needs[other]
        assert name not in seen, f"{name} is in a circle of imports"


@pytest.mark.parametrize("first", ["dmvae_lib.paper.runs", "dmvae_lib.paper.rows", "dmvae_lib.paper.rows.flowers"])
def test_any_module_can_be_imported_first(first):
    subprocess.run([sys.executable, "-c", f"import {first}"], check=True, cwd=ROOT)


def test_importing_the_library_costs_little_more_than_importing_torch():
    def seconds(module: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT, env=environment)
        return time.perf_counter() - begun

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    times = {module: [] for module in ("torch", "dmvae_lib")}
    for _ in range(5):  # in turn: the machine may be busy for a while
        for module in times:
            times[module].append(seconds(module))
    assert min(times["dmvae_lib"]) <= 1.3 * min(times["torch"]), times


def test_what_takes_long_to_import_is_not_imported():
    heavy = {
        "pandas",
        "sklearn",
        "matplotlib",
        "transformers",
        "huggingface_hub",
        "torchvision",
        "distributed",
        "scipy",
    }
    code = "import sys, dmvae_lib, dmvae_lib.metrics, dmvae_lib.analysis; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert not heavy & set(found.split())
