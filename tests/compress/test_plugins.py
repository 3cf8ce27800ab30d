"""Third-party compressors: installed with pip and used by name, and what broken ones say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress import registry
from compress.errors import PluginError, RecipeError
from compress.recipe import load_one

PLUGIN = Path(__file__).parent.parent / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example plug-in was installed into."""
    root = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
            "--no-index", "--disable-pip-version-check", "--root-user-action", "ignore",
            "--target", root / "site", root / "source",
        ],
        check=True,
    )  # fmt: skip
    return root / "site"


def python(installed: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_plugin_is_listed_conforms_and_can_be_used_by_name(installed: Path) -> None:
    script = """
import sys
from compress.cli import main
from compress.recipe import load_one
from compress.testing import check_compressor
print(len(check_compressor("ternary")), len(check_compressor("ternary", threshold=0.5)))
print(load_one({"stages": [{"use": "ternary", "threshold": 0.5}]}).stages[0].dump())
try:
    load_one({"stages": [{"use": "ternray"}]})
except Exception as error:
    print(error)
sys.argv = ["compress", "list", "--json"]
main()
"""
    checks, dumped, hint, *lines = python(installed, "-c", script).splitlines()
    assert checks == "6 6"
    assert "'threshold': 0.5" in dumped
    assert "did you mean 'ternary'?" in hint
    rows = {row["name"]: row for row in map(json.loads, lines)}
    assert rows["ternary"] == {
        "kind": "compressor", "name": "ternary", "package": "compresskit-plugin-example",
    }  # fmt: skip
    assert rows["rtn"]["package"] == "compresskit"


def test_an_installed_plugin_compresses_the_demo_model(installed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "ternary.yaml"
    recipe.write_text("model: demo\nstages:\n  - use: ternary\n")
    out = tmp_path / "small"
    python(installed, "-m", "compress.cli", "apply", recipe, "--out", out, "--quiet")
    record = json.loads((out / "compression.json").read_text())
    assert record["storage"] == "compressed-tensors"  # plain transformers loads it
    assert {site["stage"] for site in record["sites"]} == {"ternary"}
    assert all(0 < site["relative_error"] < 0.5 for site in record["sites"])
    assert record["bytes"]["disk"] < 0.5 * record["bytes"]["original"]


def install_by_hand(root: Path, package: str, name: str, value: str, module: str = "") -> None:
    """What pip leaves behind for a package with one entry point."""
    folder = root / f"{package.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {value}\n")
    (root / f"{value.partition(':')[0]}.py").write_text(module)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module_anywhere", "does not import \\(ModuleNotFoundError: No module"),
        ("1 / 0", "does not import \\(ZeroDivisionError"),
        ("", "does not import \\(AttributeError"),
        ("Method = 5", "\\(broken_method:Method\\) is not a subclass of compress.Compressor"),
        ("class Method: pass", "is not a subclass of compress.Compressor"),
    ],
)
def test_a_broken_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, reason: str
) -> None:
    install_by_hand(tmp_path, "broken-package", "wrong", "broken_method:Method", module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_method", raising=False)
    assert "wrong" in registry.available()
    message = f"compressor 'wrong' of package broken-package.*{reason}"
    for use in (registry.get, lambda name: load_one({"stages": [{"use": name}]})):
        with pytest.raises(PluginError, match=message) as caught:
            use("wrong")
        assert "\n" not in str(caught.value)
    assert registry.get("rtn").name == "rtn"  # the others still work


def test_two_packages_with_one_name_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_by_hand(tmp_path, "another", "rtn", "another_rtn:RTN")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"'rtn' is registered twice: .*another_rtn:RTN"):
        registry.available()
    with pytest.raises(PluginError, match="uninstall one"):
        registry.get("svd")


def test_an_entry_point_seen_twice_is_not_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install beside its own build leaves two equal entry points."""
    install_by_hand(tmp_path, "copy", "rtn", "compress.compressors.quantization.rtn:RTN")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.get("rtn").name == "rtn"


def test_unknown_names_have_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="no compressor is called 'magnitud'; did you mean 'magn"):
        registry.get("magnitud")
    with pytest.raises(RecipeError, match=r"choose from .*distill, .*int8, .*lora, "):
        registry.get("zzz")
