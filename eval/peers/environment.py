"""An environment for each peer, made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from compress.errors import CompressError
from eval.peers.jobs import Toolkit

HOME = Path("~/.cache/compresskit/peers")
MARK = "installed.txt"  # a copy of the requirements, written last


def python(toolkit: Toolkit, home: Path) -> Path:
    """The interpreter of the toolkit's environment under ``home``, installed if need be.

    The first line of the requirements is torch, and is installed first and alone: no later line can
    then bring another.

    Raises:
        CompressError: pip failed; its last words.
    """
    if toolkit.requirements is None:
        return Path(sys.executable)
    folder = home.expanduser() / toolkit.name
    found = folder / "bin" / "python"
    wanted = toolkit.requirements.read_text()
    mark = folder / MARK
    if mark.exists() and mark.read_text() == wanted:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(folder)], toolkit)
    _run([*pip, wanted.splitlines()[0], "setuptools"], toolkit)
    _run([*pip, "-r", str(toolkit.requirements)], toolkit)
    mark.write_text(wanted)
    return found


def _run(command: list[str], toolkit: Toolkit) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"{toolkit.name} does not install ({last}); see {toolkit.requirements}")
