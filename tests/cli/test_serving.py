"""``compress generate`` and ``compress serve``: text from a checkpoint, here and over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from compress import recipe as recipes
    from compress import run as runs

    out = tmp_path_factory.mktemp("packed") / "int4"
    recipe = recipes.load_one({"model": "demo", "stages": [{"use": "rtn"}]})
    for _ in runs.run(recipe, out, verify=False):
        pass
    return out


def test_text_goes_to_standard_output_and_speed_to_the_other(packed: Path, compress: Run) -> None:
    answer = compress("generate", packed, "def main(", "--max-new-tokens", 6)
    assert answer.code == 0
    assert answer.out.startswith("def main(self")
    assert "int4" in answer.err
    assert "6 written at" in answer.err
    unpacked = compress(
        "generate", packed, "def main(", "--max-new-tokens", 6, "--runtime", "transformers", "-q"
    )
    assert unpacked.out == answer.out
    assert unpacked.err == ""


def test_draws_depend_on_the_seed(compress: Run) -> None:
    first, again, other = (
        compress("generate", "demo", "x", "--max-new-tokens", 8, "--temperature", 2, "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert first.out == again.out != other.out
    assert "written at" in first.err


def test_models_that_write_no_text(model: Path, compress: Run) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "no tokenizer" in compress("generate", model, "x").line
    assert compress("generate", "demo", "").code == 2
    assert "transformers, packed" in compress("generate", "demo", "x", "--runtime", "fast").line


def test_a_server_is_not_given_what_it_cannot_load(tmp_path: Path, compress: Run) -> None:
    assert "no config.json" in compress("serve", tmp_path).line
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "modeling.X"}}')
    answer = compress("serve", tmp_path)
    assert answer.code == 3
    assert "modelling file" in answer.line
    assert f"compress export {tmp_path} --to dense" in answer.line
    assert compress("serve", "demo", "--server", "mine").code == 2


def test_openai_client_is_answered_on_loopback(packed: Path, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "compress.cli", "serve", str(packed), "--port", str(port)]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*line, "--server", "transformers"], env=environment) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/health")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            answer = client.completions.create(
                model=str(packed), prompt="def main(", max_tokens=2, temperature=0
            )
            assert answer.choices[0].text.startswith("self")
        finally:
            server.terminate()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(address)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")
