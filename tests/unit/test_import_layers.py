"""Imports go down only: the layers of the package, read from its source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megavlm"

# Each layer may import the layers above it in this table, never its own neighbours.
LAYERS: list[set[str]] = [
    {"config", "batch", "runtime"},
    {"data", "models", "engines"},
    {"recipe"},
    {"build"},
    {"checkpoint"},
    {"convert", "inference", "planning"},
    {
        "training",
        "evaluation",
        "preflight",
        "upcycle",
        "doctor",
        "prepare",
        "inspection",
        "soup",
        "transfer",
    },
    {"benchmark", "filters"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# An optional package's import belongs in the one class that needs it.
LAZY_IMPORTS_ALLOWED: set[str] = {"megavlm.engines.deepspeed.library", "megavlm.filters.signature"}

# Copied into exported folders, where there is no package: its files import each other by relative names, and nothing of
# this project. tests/unit/convert/test_published_code.py looks at them.
PUBLISHED_CODE = PACKAGE / "convert" / "published_code"

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PUBLISHED_CODE)


def area(path: Path) -> str:
    """First name below the package: ``models`` for models/vision/clip.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "megavlm"]


def module_name(path: Path) -> str:
    parts = ("megavlm", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def resolve(name: str) -> str:
    """The module that an imported name lies in."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def test_every_folder_has_its_layer() -> None:
    assert {area(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = area(path)
    if here == "__init__":
        return
    for name in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
        if name.count(".") == 1 and name.startswith("megavlm.__"):
            continue  # megavlm.__version__
        there = resolve(name).split(".")[1] if resolve(name) != "megavlm" else here
        allowed = there == here or LEVEL[there] < LEVEL[here]
        assert allowed, f"{module_name(path)} imports {name}: {there} is not below {here}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_inside_a_function(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not inside or module_name(path) in LAZY_IMPORTS_ALLOWED, f"{function.name} in {path}"


def test_no_import_cycle() -> None:
    graph = {
        name: {resolve(target) for target in imported_modules(ast.parse(path.read_text(encoding="utf-8")))} - {name}
        for name, path in MODULES.items()
    }
    # a package's __init__ imports its own files, which may name the package: only files count as nodes of a cycle
    graph = {name: {t for t in targets if not name.startswith(t + ".")} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_data_knows_no_model_and_no_megatron() -> None:
    for path in (PACKAGE / "data").rglob("*.py"):
        assert "megatron.core" not in path.read_text(encoding="utf-8").replace("megatron-core", ""), path


def test_only_the_runtime_knows_the_cpu_view() -> None:
    for path in FILES:
        if area(path) != "runtime":
            imported = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
            assert not any(name.startswith("megavlm.runtime.cpu_device") for name in imported), path
