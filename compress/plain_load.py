"""Load a checkpoint with plain transformers, as a stranger would, and say what came out.

Run as a program of its own by ``verify``, in a process where ``compress`` cannot be imported. It
reads one JSON request a line, ``{"folder", "auto_class", "remote_code", "inputs"}``, and answers
each with one JSON line: ``{"logits": […], "missing": […], …}`` or ``{"error": "…"}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

OBSERVED = 256  # logits that are compared


def make_inputs(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The probe's inputs: token ids that jump about the vocabulary, or smooth waves."""
    inputs = {}
    for name, entry in spec.items():
        count = torch.Size(entry["shape"]).numel()
        ramp = torch.arange(1, count + 1)
        if "modulo" in entry:
            values = ramp * 7919 % entry["modulo"]
        else:
            values = torch.sin(ramp.double() / 7).float()
        inputs[name] = values.view(entry["shape"])
    return inputs


def observe(model: Any, spec: dict[str, Any]) -> list[float]:
    """Evenly spaced entries of what the model puts out for the probe."""
    inputs = make_inputs(spec)
    with torch.no_grad():
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        output = model(**inputs)
    values = (output.logits if hasattr(output, "logits") else output[0]).float().flatten()
    places = torch.linspace(0, len(values) - 1, min(OBSERVED, len(values))).round().long()
    return [round(v, 6) for v in values[places].tolist()]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    import transformers

    model, info = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"],
        output_loading_info=True,
        dtype="auto",
        trust_remote_code=True if request["remote_code"] else None,
    )
    model.eval()
    generated = 0
    logits = observe(model, request["inputs"])
    if model.can_generate() and "input_ids" in request["inputs"]:
        tokens = make_inputs(request["inputs"])["input_ids"][:1]
        generated = model.generate(tokens, max_new_tokens=2, do_sample=False).shape[1]
    return {
        "logits": logits,
        "generated": generated,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
    }


def main() -> None:
    sys.modules["compress"] = None  # type: ignore[assignment]  # importing it raises from here on
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not mix with the replies
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            reply = {"error": f"{type(error).__name__}: {text[-1][:300]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
