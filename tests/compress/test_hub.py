"""Pushing to the hub, with a stand-in for its client: what is sent, and what is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from tiny import DEMO

import compress
from compress.errors import CheckpointError, ModelError, RecipeError
from compress.hub import check_card, upload
from eval.harness import evaluate
from eval.results import read


class Hub:
    """Takes what HfApi would send."""

    sent: dict[str, Any]
    refuses: Exception | None = None

    def __init__(self) -> None:
        Hub.sent = {}

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.refuses:
            raise self.refuses
        Hub.sent["made"] = (repo, options)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        Hub.sent["files"] = sorted(path.name for path in folder_path.iterdir())
        Hub.sent["options"] = options
        return f"https://hub/{repo_id}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "small"
    compress.apply({"stages": [{"use": "rtn", "bits": 4}]}, model="demo", out=out, verify=False)
    list(evaluate([str(out)], ["nll", "size_bytes"], samples=4, length=64))
    return out


def test_a_checkpoint_is_sent_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert upload(folder, "me/small", private=True, message="first") == "https://hub/me/small"
    assert Hub.sent["made"] == ("me/small", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "config.json", "recipe.yaml", "README.md", "results.jsonl",
            "tokenizer.json", "compression.json"} <= set(Hub.sent["files"])  # fmt: skip
    assert Hub.sent["options"]["commit_message"] == "first"


def test_the_card_has_valid_metadata_with_results(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    data = check_card(folder)
    assert data["library_name"] == "transformers"
    assert "compressed" in data["tags"]
    (index,) = data["model-index"]
    assert index["name"] == "small"
    (result,) = index["results"]
    nll = next(row for row in read(folder) if row.metric == "nll")
    assert result["metrics"] == [{"type": "nll", "value": nll.value}]
    assert nll.data["hash"] in result["dataset"]["name"]
    for told in (nll.data["hash"], "use: rtn", "AutoModelForCausalLM.from_pretrained", "torch 2."):
        assert told in card.text
    before = (folder / "README.md").read_text()
    list(evaluate([str(folder)], ["nll"], samples=4, length=64))
    assert (folder / "README.md").read_text() == before


def test_what_cannot_be_pushed_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.sent = {}
    for name in ("small", "me/small/again", "me/sm all"):
        with pytest.raises(RecipeError, match="expected USER/NAME"):
            upload(folder, name)
    with pytest.raises(ModelError, match="not a Hugging Face model folder"):
        upload(tmp_path, "me/small")
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no model card"):
        upload(tmp_path, "me/small")
    (tmp_path / "README.md").write_text("# no metadata\n")
    with pytest.raises(CheckpointError, match="names no library_name"):
        upload(tmp_path, "me/small")
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CheckpointError, match="not a model card's"):
        upload(tmp_path, "me/small")
    assert Hub.sent == {}


def test_a_hub_that_refuses_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(Hub):
        refuses = OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Closed)
    with pytest.raises(CheckpointError, match=r"did not take it as me/small \(no route to host\)"):
        upload(folder, "me/small")


def test_nobody_at_the_other_end_is_one_clear_error(folder: Path) -> None:
    class Nowhere(huggingface_hub.HfApi):
        def __init__(self) -> None:
            super().__init__("http://127.0.0.1:9", token="none")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", Nowhere)
        with pytest.raises(CheckpointError, match=r"as me/small \(.*refused"):
            upload(folder, "me/small")
