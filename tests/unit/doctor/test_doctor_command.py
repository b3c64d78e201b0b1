"""``megavlm doctor`` on this machine."""

import json
from pathlib import Path

import pytest

from megavlm.cli import main

TINY = Path(__file__).parents[3] / "examples" / "nvlm" / "tiny.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return int(stopped.value.code or 0), capsys.readouterr().out


def test_a_needed_package_that_is_missing_is_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("importlib.import_module", fail)
    missing = "transformers"
    with pytest.raises(SystemExit, match=r"^megavlm: error: transformers is not installed\. pip install -c"):
        main(["doctor"])
    missing = "megavlm.lost"  # ours: not to be mended by an installation
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_it_exits_with_an_error_only_where_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = run(capsys, str(TINY))
    assert (code, "fits together" in text) == (0, True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, text = run(capsys, str(TINY), "engine.backend=transformer_engine", "engine.precision=fp8")
    assert code == 1
    assert "problem: engine.backend=transformer_engine: there is no GPU. Set engine.backend=torch" in text
    code, text = run(capsys, "--json")
    assert code == 0
    tree = json.loads(text)
    assert tree["problems"] == []
    assert {finding["name"]: finding["status"] for finding in tree["findings"]}["torch"] == "ok"
    assert tree["padding"] is None
