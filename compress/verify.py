"""Proof that a folder holds what was made: loaded by plain transformers in a fresh process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import plain_load
from compress.checkpoint import RECORD, record
from compress.errors import CheckpointError, ModelError
from compress.writer import sha256

# Largest relative difference of the logits. LLM.int8 also rounds activations as it multiplies;
# the nf4 kernel of CPUs with AVX512-BF16 multiplies in bfloat16, whatever the model's dtype. Inputs
# that are rounded to 8 bits may come out a step apart when they were a little apart before.
TOLERANCE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2}
TOLERANCE_INT8 = 0.2


class Verifier(AbstractContextManager["Verifier"]):
    """A process without this library, which loads folders one after the other.

    It starts at once, so that its imports run while the main process compresses.
    """

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory()
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": self._home.name,
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._log = Path(self._home.name, "log").open("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", Path(plain_load.__file__).read_text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=self._home.name,
        )

    def check(self, folder: Path) -> dict[str, Any]:
        """Check one folder; returns what was found.

        Raises:
            CheckpointError: with the first thing that is not as it should be.
        """
        info = record(folder)
        if not info:
            raise CheckpointError(
                f"{folder}: no {RECORD}; verify checks folders that `compress apply` wrote"
            )
        check_files(folder, info)
        check_sizes(folder, info)
        expected = info["expected"]
        reply = self._ask(
            {
                "folder": str(folder.resolve()),
                "auto_class": expected["auto_class"],
                "remote_code": info["storage"] == "modelling file",
                "inputs": expected["inputs"],
            }
        )
        if "error" in reply:
            raise CheckpointError(
                f"{folder}: plain transformers does not load it: {reply['error']}"
            )
        for what in ("missing", "mismatched", "unexpected"):
            if reply[what]:
                raise CheckpointError(
                    f"{folder}: {len(reply[what])} {what} tensors when loaded, "
                    f"first {reply[what][0]}"
                )
        difference = relative_difference(reply["logits"], expected["logits"])
        allowed = tolerance(info)
        if not difference <= allowed:
            raise CheckpointError(
                f"{folder}: loaded logits differ from the compressed model's by "
                f"{difference:.2g} (relative), more than {allowed}"
            )
        return {
            "folder": str(folder),
            "storage": info["storage"],
            "loads_with": info["loads_with"],
            "difference": difference,
            "tolerance": allowed,
            "bytes": info["bytes"]["disk"],
            "generated": reply["generated"],
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            tail = self._log.read().strip().splitlines()[-1:] or ["no output"]
            return {"error": f"the checking process ended ({tail[0]}); is memory short?"}
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._home.cleanup()


def verify(folder: str | Path) -> dict[str, Any]:
    """Check one folder in a process of its own; see ``Verifier.check``."""
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: no such folder")
    with Verifier() as verifier:
        return verifier.check(Path(folder))


def check_files(folder: Path, info: dict[str, Any]) -> None:
    """The weight files are there, whole and unchanged."""
    for name, digest in info["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder}: {name} is not the file that was written (truncated or changed)"
            )


def check_sizes(folder: Path, info: dict[str, Any]) -> None:
    """Every site that was to change did, and bytes fell wherever the method packs."""
    for site in info["sites"]:
        unchanged = site["kind"] == "dense" and site["relative_error"] == 0
        if unchanged and not site.get("kept"):
            raise CheckpointError(f"{folder}: {site['stage']} left {site['name']} as it was")
    packed = [s for s in info["sites"] if s["packs"]]
    before = sum(s["bytes_before"] for s in packed)
    after = sum(s["bytes"] for s in packed)
    if packed and after >= before:
        raise CheckpointError(
            f"{folder}: the compressed weights take {after:,} bytes, no less than "
            f"the {before:,} before"
        )


def tolerance(info: dict[str, Any]) -> float:
    dtype = info["expected"]["dtype"]
    if info["storage"] == "bitsandbytes":
        int8 = any(site["kind"] == "int8" for site in info["sites"])
        return TOLERANCE_INT8 if int8 else TOLERANCE["bfloat16"]
    rounds = any("activations" in site for site in info["sites"])
    return max(TOLERANCE[dtype], TOLERANCE["bfloat16"] if rounds else 0)


def relative_difference(a: list[float] | Tensor, b: list[float] | Tensor) -> float:
    """‖a − b‖ / ‖b‖, infinite when the lengths differ or something is not a number."""
    if len(a) != len(b):
        return math.inf
    x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    value = ((x - y).norm() / y.norm().clamp(min=1e-12)).item()
    return math.inf if math.isnan(value) else value


def probe_inputs(model: Any) -> dict[str, Any]:
    """Inputs for ``plain_load.make_inputs`` that this architecture takes."""
    config = model.config
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": {"shape": [1, config.num_channels, height, width]}}
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        features = {"input_features": {"shape": [1, config.num_mel_bins, frames]}}
        return features | written_inputs(config)
    if model.main_input_name == "input_ids" and vocabulary:
        tokens = {"input_ids": {"shape": [1, 16], "modulo": vocabulary}}
        return tokens | written_inputs(config)
    raise ModelError(
        f"{type(model).__name__} takes {model.main_input_name}; only text, images and "
        "audio features are understood"
    )


def written_inputs(config: Any) -> dict[str, Any]:
    """Those of ``probe_inputs`` that the decoder of an encoder-decoder writes."""
    if not config.is_encoder_decoder:
        return {}
    vocabulary = config.get_text_config().vocab_size
    return {"decoder_input_ids": {"shape": [1, 8], "modulo": vocabulary}}
