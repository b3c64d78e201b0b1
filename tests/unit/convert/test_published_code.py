"""The code that exported folders bring along stands alone: it needs its neighbours and public packages only."""

import ast
import sys
from pathlib import Path

import pytest

from megavlm.convert.own_layout import CODE_FOLDER, MODEL_CODE

FILES = sorted(CODE_FOLDER.glob("*.py"))
ALLOWED = {"torch", "transformers", "numpy", "PIL", "tokenizers", *sys.stdlib_module_names}


def test_every_model_file_is_there() -> None:
    assert {file.name for file in FILES} >= set(MODEL_CODE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_imports_neighbours_and_public_packages_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert f"{node.module}.py" in {file.name for file in FILES}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in ALLOWED
