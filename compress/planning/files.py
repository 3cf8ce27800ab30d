"""How large the weight file of a plan is, names and header included, before anything is made."""

from __future__ import annotations

import torch

from compress.anatomy import Site
from compress.compressors.quantization.gptq import GPTQ
from compress.formats import Format
from compress.formats import choose as choose_format
from compress.planning.options import Option, Settings
from compress.source import Source
from compress.store import file_size
from compress.weights import Dense, Quantized, Weight
from compress.weights.quantized import scale_dtype


class Files:
    """Exact bytes, from weights of the right shapes and no numbers."""

    def __init__(self, source: Source, gptq: GPTQ, storage: str) -> None:
        self.source, self.gptq, self.storage = source, gptq, storage
        self.sites = {site.name: site for site in source.anatomy.sites}
        self.known: dict[tuple[str, Option], Weight] = {}
        inside = {site.parameter for site in self.sites.values()}
        self.others = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape, dtype in source.headers()
            if name not in inside
        }

    def format(self, settings: Settings) -> Format:
        """The plainest format that holds these settings, all other matrices as they are."""
        specs = {name: self._weight(name, settings).spec for name in self.sites}
        source = self.source
        return choose_format(source.anatomy, specs, source.model_class, source.config, self.storage)

    def size(self, settings: Settings) -> int:
        """Bytes of the weight file."""
        how, tensors = self.format(settings), dict(self.others)
        for name, site in self.sites.items():
            tensors |= how.tensors(site, self._weight(name, settings))
        return file_size(tensors)

    def _weight(self, name: str, settings: Settings) -> Weight:
        option = settings.get(name, Option())
        if (name, option) not in self.known:
            self.known[name, option] = self._made(self.sites[name], option)
        return self.known[name, option]

    def _made(self, site: Site, option: Option) -> Weight:
        rows, columns = site.shape
        if option.bits is None:
            return Dense.of(torch.empty(rows, columns, dtype=site.dtype, device="meta"))
        group = columns if option.group == "channel" else min(option.group, columns)
        grid = torch.zeros(rows, -(-columns // group))
        packed = Quantized.pack(
            torch.zeros(rows, columns, dtype=torch.uint8),
            grid.to(scale_dtype(site.dtype)),
            None if self.gptq.symmetric else grid,
            bits=option.bits,
            group=group,
            dtype=site.dtype,
        )
        return Quantized(packed.spec, {k: t.to("meta") for k, t in packed.tensors.items()})
