"""Name → class, found through entry points, built-ins and third parties alike."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from compress.compressors.base import Compressor
from compress.errors import PluginError, RecipeError, did_you_mean

GROUP = "compress.compressors"
EXPORTERS = "compress.exporters"
Plugin = TypeVar("Plugin")


def available(group: str = GROUP) -> dict[str, EntryPoint]:
    """Every class registered in an entry point group, by name; nothing is imported.

    Raises:
        PluginError: two packages register one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise PluginError(
                f"{_noun(group)} '{point.name}' is registered twice: {known.value} and "
                f"{point.value}; uninstall one of the packages"
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def get(name: str) -> type[Compressor]:
    """The compressor registered as ``name``; see ``find``."""
    return find(name, GROUP, Compressor)


def find(name: str, group: str, base: type[Plugin]) -> type[Plugin]:
    """The subclass of ``base`` registered as ``name`` in an entry point group.

    Raises:
        RecipeError: no such name. PluginError: it does not import, or is no such subclass.
    """
    points = available(group)
    if name not in points:
        raise RecipeError(f"no {_noun(group)} is called '{name}'{did_you_mean(name, points)}")
    point = points[name]
    package = point.dist.name if point.dist else "?"
    where = f"{_noun(group)} '{name}' of package {package}"
    try:
        cls = point.load()
    except Exception as error:
        raise PluginError(f"{where} does not import ({type(error).__name__}: {error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{where} ({point.value}) is not a subclass of compress.{base.__name__}")
    cls.name = name  # type: ignore[attr-defined]
    return cls


def _noun(group: str) -> str:
    return group.rpartition(".")[2].removesuffix("s")
