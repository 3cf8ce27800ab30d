"""How much memory a checkpoint takes to load and to run once, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from compress import checkpoint
from compress.errors import ModelError, NotMeasurable
from compress.objective import Examples
from eval.metrics.base import Context, Metric, load_model, read_config
from eval.metrics.examples import made_up
from eval.results import Result

CHILD = "import sys; from eval.metrics.memory import child; child(*sys.argv[1:])"


class PeakMemory(Metric):
    """Peak resident memory of loading the checkpoint and running one window, above what the
    process held right before, its imports done. On a GPU ``detail`` adds what torch held there.

    Only one window of batch 1 is run: activations grow with both.
    """

    name = "peak_memory"
    unit = "bytes"
    higher_is_better = False
    beside_original = True

    def setup(self, context: Context) -> dict[str, Any]:
        return {"length": context.length, "batch": 1}

    def measure(self, context: Context) -> Result:
        own = _fresh_process(context.folder, context.length)
        detail: dict[str, Any] = {"forward": own["forward"]}
        if own["gpu"] is not None:
            detail["gpu"] = own["gpu"]
        if context.original is not None:
            key = (self.name, context.original, context.length)
            if context.is_original:
                context.shared[key] = own
            if key not in context.shared:
                context.shared[key] = _fresh_process(context.original, context.length)
            original = context.shared[key]
            detail["original"] = original["rss"]
            if original["rss"]:  # a model of a few kilobytes may not show
                detail["ratio"] = own["rss"] / original["rss"]
            if original["gpu"] is not None:
                detail["original_gpu"] = original["gpu"]
        return self.result(context, own["rss"], detail=detail)


def _fresh_process(name: str, length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name, str(length), str(answer)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ModelError(f"{name}: does not load and run in a fresh process ({last})")
        return json.loads(answer.read_text())


def child(name: str, length: str, answer: str) -> None:
    """What the fresh process runs; it writes {rss, gpu, forward} to the file ``answer``."""
    for architecture in read_config(checkpoint.resolve(name)).get("architectures") or []:
        getattr(transformers, architecture, None)  # import the model's code before the count starts
    before = peak_rss()
    model = load_model(name)
    forward = True
    try:
        examples = _one_input(model, int(length))
    except NotMeasurable:  # audio and other inputs: the memory of loading is still worth knowing
        forward = False
    if forward:
        with torch.inference_mode():
            examples.call(model, slice(None))
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    result = {"rss": peak_rss() - before, "gpu": gpu, "forward": forward}
    Path(answer).write_text(json.dumps(result))


def _one_input(model: transformers.PreTrainedModel, length: int) -> Examples:
    if model.main_input_name != "pixel_values":
        return made_up(model, batch=1, length=length)
    side = getattr(model.config, "image_size", 224)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels = getattr(model.config, "num_channels", 3)
    return Examples({"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype)})


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes.

    Linux's getrusage also remembers the parent from before exec, so /proc is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
