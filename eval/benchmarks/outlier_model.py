"""A model with large channels among its activations, equal to one without.

    python -m eval.benchmarks.outlier_model runs/outlier-model
    compress run recipes/outliers.yaml --model runs/outlier-model --out runs/outliers-planted

Every 23rd channel of what each norm puts out is made 64 times larger, and the columns that read it
as much smaller: large language models grow such channels by themselves (LLM.int8(), arXiv
2208.07339), small ones do not. In float32, so that nothing is lost by the move.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import load, load_tokenizer
from compress.source import Source
from compress.wiring import find_wires

EVERY, FACTOR = 23, 64


def plant(folder: Path) -> Path:
    """Plant large channels into a model folder of one float32 weight file; returns it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for wires in find_wires(Source(str(folder))):
        for wire in (w for w in wires if w.site is None):
            factor = torch.ones(len(wire.source))
            factor[5::EVERY] = FACTOR
            tensors[wire.producer] = tensors[wire.producer] * factor
            for site in wire.readers:
                tensors[site.parameter] = tensors[site.parameter] / factor
    save_file(tensors, file, {"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    load(options.model, dtype=torch.float32).save_pretrained(options.out)
    tokenizer: Any = load_tokenizer(options.model)
    tokenizer.save_pretrained(options.out)
    plant(options.out)


if __name__ == "__main__":
    main()
