"""How large the weight file of a plan is, names and header included, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.formats import Format
from compress.formats import choose as choose_format
from compress.planning.menus import Menu
from compress.planning.options import Option, Settings
from compress.source import Source
from compress.store import file_size
from compress.weights import Dense, Sum, Weight
from compress.writer import adapter_tensors


class Files:
    """Bytes from weights of the right shapes and no numbers: exact, or of streams at most."""

    def __init__(self, source: Source, menus: Mapping[str, Menu], storage: str) -> None:
        self.source, self.menus, self.storage = source, menus, storage
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
        """Bytes of the weight file, and of an adapter beside it."""
        how, tensors = self.format(settings), dict(self.others)
        beside: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            weight = self._weight(name, settings)
            if isinstance(weight, Sum) and not how.holds_sums:
                weight, *rest = weight.terms
                beside |= adapter_tensors(name, rest)
            tensors |= how.tensors(site, weight)
        return file_size(tensors) + (file_size(beside) if beside else 0)

    def bytes(self, site: Site, option: Option) -> int:
        """Of one matrix."""
        return self._weight(site.name, {site.name: option}).nbytes

    def _weight(self, name: str, settings: Settings) -> Weight:
        option = settings.get(name, Option())
        if (name, option) not in self.known:
            self.known[name, option] = self._made(self.sites[name], option)
        return self.known[name, option]

    def _made(self, site: Site, option: Option) -> Weight:
        if option.use:
            return self.menus[option.use].weight(site, option)
        return Dense.of(torch.empty(site.shape, dtype=site.dtype, device="meta"))
