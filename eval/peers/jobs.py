"""What is compared: toolkits, their methods, and the settings that they are given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = "compresskit"


@dataclass(frozen=True)
class Toolkit:
    """``requirements`` None: it runs in the environment that eval itself is in."""

    name: str
    adapter: Path
    requirements: Path | None = None


TOOLKITS = {
    OURS: Toolkit(OURS, HERE / "ours.py"),
    **{
        name: Toolkit(
            name,
            HERE / f"{name.replace('-', '_')}.py",
            HERE / "requirements" / f"{name}.txt",
        )
        for name in ("llm-compressor", "auto-round", "hqq", "bitsandbytes")
    },
}


@dataclass(frozen=True)
class Setting:
    """Bits and group (None: a whole row), or the share or pattern of weights that go."""

    bits: int | None = None
    group: int | None = None
    sparsity: float | None = None
    pattern: str | None = None

    @property
    def label(self) -> str:
        if self.bits is None:
            return f"{self.pattern or f'{self.sparsity:.0%}'} sparse"
        return f"{self.bits} bits, " + (f"groups of {self.group}" if self.group else "whole rows")


PRUNING = (Setting(sparsity=0.5), Setting(sparsity=0.5, pattern="2:4"), Setting(sparsity=0.7))


@dataclass(frozen=True)
class Method:
    """A row of the table, before its setting and seed.

    name     how the table calls it
    method   how the adapter calls it
    options  the adapter's; of ours, the stages of a recipe, each given what it takes of the setting
    prunes   whether its setting is a sparsity, or else bits
    reads    whether it reads calibration text, so that the seed matters
    bits     the only bits that it has; None: any
    """

    toolkit: str
    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    prunes: bool = False
    reads: bool = True
    bits: int | None = None


def _ours(name: str, *stages: dict[str, Any], **rest: Any) -> Method:
    return Method(OURS, name, name, {"stages": list(stages)}, **rest)


RECIPES = (
    _ours("rtn", {"use": "rtn"}, reads=False),
    _ours("gptq", {"use": "gptq"}),
    _ours("awq", {"use": "awq"}, {"use": "rtn"}),
    _ours("gptq, autoround", {"use": "gptq"}, {"use": "autoround"}),
    _ours("ecgptq", {"use": "ecgptq"}),
    _ours("nf4", {"use": "nf4"}, reads=False, bits=4),
    _ours("magnitude", {"use": "magnitude"}, prunes=True, reads=False),
    _ours("wanda", {"use": "wanda"}, prunes=True),
    _ours("sparsegpt", {"use": "sparsegpt"}, prunes=True),
    _ours("admm", {"use": "admm"}, prunes=True),
)

MSE = {"observer": "mse"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PEERS = (
    Method("llm-compressor", "rtn", "rtn", reads=False),
    Method("llm-compressor", "rtn, mse scales", "rtn", MSE, reads=False),
    Method("llm-compressor", "gptq", "gptq"),
    Method("llm-compressor", "gptq, mse scales", "gptq", MSE),
    Method("llm-compressor", "awq", "awq"),
    Method("llm-compressor", "awq, mse scales, duo both", "awq",
           MSE | {"duo_scaling": "both"}),
    Method("llm-compressor", "wanda", "wanda", prunes=True),
    Method("llm-compressor", "sparsegpt", "sparsegpt", prunes=True),
    Method("auto-round", "200 iterations", "auto-round", {"iters": 200}),
    Method("auto-round", "1000 iterations", "auto-round", {"iters": 1000}),
    Method("hqq", "axis 1", "hqq", {"axis": 1}, reads=False),
    Method("hqq", "axis 0", "hqq", {"axis": 0}, reads=False),
    Method("bitsandbytes", "nf4", "nf4", NF4, reads=False, bits=4),
    Method("bitsandbytes", "nf4, double quant", "nf4",
           NF4 | {"bnb_4bit_use_double_quant": True}, reads=False, bits=4),
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What everyone reads: windows of calibration text, and those that nobody saw."""

    data: str
    samples: int = 128
    length: int = 256
    held_out: int = 128


@dataclass(frozen=True)
class Job:
    """One compression. Two equal jobs give the same row."""

    method: Method
    setting: Setting
    seed: int
    model: str
    text: Text
    threads: int = 1

    @property
    def key(self) -> str:
        """The same for equal jobs."""
        return json.dumps(self.dump(), sort_keys=True)

    @property
    def label(self) -> str:
        seed = f", seed {self.seed}" if self.method.reads else ""
        return f"{self.method.toolkit} {self.method.name}, {self.setting.label}{seed}"

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(raw: dict[str, Any]) -> Job:
        return Job(
            **raw
            | {
                "method": Method(**raw["method"]),
                "setting": Setting(**raw["setting"]),
                "text": Text(**raw["text"]),
            }
        )


def jobs(
    methods: Sequence[Method], settings: Sequence[Setting], seeds: Sequence[int], **rest: Any
) -> Iterator[Job]:
    """Every method at every setting that it has, seed after seed; one seed if it reads no text."""
    for seed, setting, method in itertools.product(seeds, settings, methods):
        if method.prunes != (setting.bits is None):
            continue
        if method.bits is not None and (setting.bits, setting.group) != (method.bits, 64):
            continue
        if method.reads or seed == seeds[0]:
            yield Job(method, setting, seed, **rest)
