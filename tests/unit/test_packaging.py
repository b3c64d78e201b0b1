"""An installed copy holds the whole package, not only what an editable install finds beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    wheel = ["egg_info", "--egg-base", str(tmp_path), "bdist_wheel", "--dist-dir", str(tmp_path)]
    result = subprocess.run([*build, *wheel], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    [path] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(path).namelist() if name.startswith("megavlm/")}
    files = [*(REPOSITORY / "megavlm").rglob("*.py"), *(REPOSITORY / "megavlm/inspection/template").iterdir()]
    sources = {str(file.relative_to(REPOSITORY)) for file in files}
    assert held == sources
