"""Name → compressor class, found through entry points, built-ins and third parties alike."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from compress.compressors.base import Compressor
from compress.errors import PluginError, RecipeError, did_you_mean

GROUP = "compress.compressors"


def available() -> dict[str, EntryPoint]:
    """Every registered compressor, by name; nothing is imported.

    Raises:
        PluginError: two packages register one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise PluginError(
                f"compressor '{point.name}' is registered twice: {known.value} and "
                f"{point.value}; uninstall one of the packages"
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def get(name: str) -> type[Compressor]:
    """The class registered as ``name``.

    Raises:
        RecipeError: no such name. PluginError: it does not import, or is no compressor.
    """
    points = available()
    if name not in points:
        raise RecipeError(f"no compressor is called '{name}'{did_you_mean(name, points)}")
    point = points[name]
    package = point.dist.name if point.dist else "?"
    try:
        cls = point.load()
    except Exception as error:
        raise PluginError(
            f"compressor '{name}' of package {package} does not import "
            f"({type(error).__name__}: {error})"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Compressor)):
        raise PluginError(
            f"compressor '{name}' of package {package} ({point.value}) is not a "
            "subclass of compress.Compressor"
        )
    cls.name = name
    return cls
