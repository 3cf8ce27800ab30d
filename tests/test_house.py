"""What holds for the whole of the library: the direction of imports, size, silence, conformance."""

from __future__ import annotations

import ast
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.preflight import preflight
from compress.registry import available
from compress.source import Source
from compress.testing import check_compressor

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "compress").rglob("*.py"))
MODULES = sorted([*LIBRARY, *(ROOT / "eval").rglob("*.py")])
# Each may import those before it, and its own layer; cli may import eval as well.
LAYERS = (
    "errors", "sizes", "memory", "products", "offload", "distributed", "events", "weights",
    "anatomy", "moments", "problem", "store", "data", "objective", "sharded", "zero", "muon",
    "training", "compressors", "registry", "recipe", "order", "source", "shape", "blockwise",
    "assemble", "formats", "gguf_file", "stored", "checkpoint", "calibration", "sensitivity",
    "solvers", "layerwise", "preflight", "plain_load", "writer", "workdir", "verify", "wiring",
    "heads", "rotation", "transform", "narrowing", "shortening", "slicing", "structure", "planning",
    "run", "export", "runtime", "api", "testing", "arguments", "display", "hub", "plan_command",
    "export_command", "generate_command", "serve_command", "cli",
)  # fmt: skip
TALKERS = {"cli", "plain_load", "display", "__main__"}


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "compress").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, within functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            package = node.module in ("compress", "eval")
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if package else {node.module}
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":  # the public face imports lazily, by name
        assert not {m for m in imports(path) if m.startswith(("compress", "eval"))}
        return
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package == "compress":
            assert rest.partition(".")[0] in allowed, f"{layer} imports {module}"
        assert package != "eval" or layer == "cli", f"{layer} imports {module}"


def test_every_module_has_a_place_in_the_order() -> None:
    assert {layer_of(path) for path in LIBRARY} - {"__init__"} == set(LAYERS)


def test_files_that_run_elsewhere_do_not_need_the_library() -> None:
    for name in ("weights/modeling_compressed.py", "plain_load.py"):
        own = {m for m in imports(ROOT / "compress" / name) if m.split(".")[0] == "compress"}
        assert not own


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long_and_each_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert "TODO" not in text


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_never_prints(path: Path) -> None:
    if path.stem in TALKERS or "benchmarks" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Name) and node.id == "print"), f"line {node.lineno}"


def test_the_builtin_eval_is_never_shadowed() -> None:
    for path in MODULES:
        assert not re.search(r"^\s*import eval\b", path.read_text(), re.MULTILINE), path


def test_every_entry_point_loads() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = declared["entry-points"] | {"console_scripts": declared["scripts"]}
    for group, points in groups.items():
        installed = {p.name: p for p in entry_points(group=group)}
        for name, value in points.items():
            assert name in installed, f"{name}: install the package again (pip install -e .)"
            assert installed[name].value == value
            installed[name].load()


@pytest.mark.parametrize("name", available())
def test_every_compressor_conforms(name: str) -> None:
    assert len(check_compressor(name)) >= 5


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_valid(path: Path) -> None:
    for recipe in recipes.load(path).values():
        demo = recipes.load_one(recipe.dump(), {"model": "demo"})
        assert recipes.load_one(recipe.dump()) == recipe
        preflight(demo, Source("demo", untie=recipe.untie))
