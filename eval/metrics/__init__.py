"""Metrics are plug-ins: this file finds them by name, through the entry points ``eval.metrics``.

Built-in metrics come the same way as anybody's. A package that adds one writes a subclass of
:class:`eval.metrics.base.Metric` and one line in its ``pyproject.toml``::

    [project.entry-points."eval.metrics"]
    my_metric = "my_package.my_module:MyMetric"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from compress.errors import PluginError, RecipeError, did_you_mean
from eval.metrics import tasks
from eval.metrics.base import Metric
from eval.metrics.huggingface import PREFIX, HuggingFaceMetric

GROUP = "eval.metrics"

FAMILIES = {
    "quality": ("nll", "perplexity", "bits_per_byte", "kl", "top1_agreement"),
    "size": ("size_bytes", "bits_per_param"),
    "memory": ("peak_memory",),
    "embedding": ("embedding_cosine", "embedding_neighbours"),
    "speed": ("prefill_tokens_per_s", "decode_tokens_per_s"),
}
"""Names that stand for several metrics, for short recipes: ``evaluate: [perplexity, size]``."""

BY_NAME = ("embedding",)
"""Families that are measured only when they are named."""

DEFAULT = (
    *(name for family, names in FAMILIES.items() if family not in BY_NAME for name in names),
    "generation",
)
"""What is measured when nobody says what to measure."""


def available() -> dict[str, EntryPoint]:
    """Every metric that is installed, by name, not imported yet.

    Raises:
        PluginError: two packages give the same name to different metrics.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise PluginError(
                f"metric '{entry.name}' is offered twice, as {other.value} and as {entry.value}; "
                "uninstall one of the two packages"
            )
    return found


def get(name: str) -> Metric:
    """The metric called ``name``, ``evaluate:NAME`` of the Hugging Face library, or ``task:NAME``
    of lm-evaluation-harness.

    Raises:
        RecipeError: no metric has this name.
        PluginError: the plug-in does not import, or is no subclass of ``Metric``.
    """
    if name.startswith(PREFIX):
        return HuggingFaceMetric(name)
    if name.startswith(tasks.PREFIX):
        return tasks.HarnessTask(name)
    known = available()
    if name not in known:
        raise RecipeError(f"no metric is called '{name}'{did_you_mean(name, known)}")
    entry = known[name]
    source = f"metric '{name}' ({entry.value}, package {entry.dist.name if entry.dist else '?'})"
    try:
        metric = entry.load()()
    except Exception as error:
        raise PluginError(
            f"{source} does not load: {error.__class__.__name__}: {error}; "
            "repair or uninstall the package"
        ) from error
    if not isinstance(metric, Metric):
        raise PluginError(f"{source} is not a subclass of eval.metrics.base.Metric")
    return metric
