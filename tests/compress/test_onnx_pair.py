"""Encoder-decoders in onnxruntime: two graphs, logits, generation, and folders as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import compress
from compress.checkpoint import fingerprint, weight_files
from compress.errors import CheckpointError
from compress.export import onnx_session
from compress.export.export import export
from compress.generate_command import preferred
from compress.verify import relative_difference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOKENS = torch.randint(2, 2048, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, 6:] = MASK[2, 8:] = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A compressed T5 whose table is packed, and its export."""
    folder = tmp_path_factory.mktemp("t5")
    one = {"num_layers": 1, "num_decoder_layers": 1, "initializer_factor": 2.0}
    config = transformers.T5Config(**tiny.T5.to_dict() | one)
    tiny.save(folder / "original", "T5ForConditionalGeneration", config)
    stages = [{"use": "rtn", "bits": 4, "group": 16, "targets": ["all"]}]
    compressed, out = folder / "compressed", folder / "onnx"
    compress.apply({"stages": stages}, model=str(folder / "original"), out=compressed, verify=False)
    export(compressed, "onnx", out, int8_activations=False)
    return compressed, out


def test_logits_and_text_are_those_of_the_folder(folders: tuple[Path, Path]) -> None:
    dense: Any = compress.load(folders[0], dtype=torch.float32)
    model: Any = compress.load(folders[1])  # there is but one way to run it
    written = TOKENS[:, :5]
    with torch.no_grad():
        expected = dense(TOKENS, attention_mask=MASK, decoder_input_ids=written).logits
    found = model(TOKENS, attention_mask=MASK, decoder_input_ids=written).logits
    assert relative_difference(found.flatten(), expected.flatten()) < 3e-3
    for each in (dense, model):
        each.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "attention_mask": MASK}
    text = model.generate(TOKENS, **settings)
    assert torch.equal(text, dense.generate(TOKENS, **settings))
    assert len(text.unique()) > 3
    sampled = model.generate(TOKENS[:1], do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape == (2, 4)


def test_every_matrix_is_in_one_graph_and_the_table_once(folders: tuple[Path, Path]) -> None:
    out = folders[1]
    graphs = [onnx.load(file, load_external_data=False).graph for file in onnx_session.files(out)]
    products = [
        {i for node in graph.node if node.op_type == "MatMulNBits" for i in node.input[1:2]}
        for graph in graphs
    ]
    assert [len(names) for names in products] == [8, 9]  # one layer each; keys and values; head
    held = [
        {(e["offset"], e["length"]) for t in graph.initializer if (e := _entries(t))}
        for graph in graphs
    ]
    table = 2048 * 32 // 2
    assert str(table) in {length for _, length in held[0] & held[1]}
    data = (out / onnx_session.DATA).stat().st_size
    assert data == sum(int(length) for _, length in held[0] | held[1])


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_an_exported_folder_is_a_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    compressed, out = folders
    names = ["decoder.onnx", "encoder.onnx", "model.onnx.data"]
    assert [file.name for file in weight_files(out)] == names
    assert fingerprint(out) != fingerprint(compressed)
    assert compress.checkpoint.record(out)["bytes"]["disk"] == sum(
        file.stat().st_size for file in weight_files(out)
    )
    assert preferred(out) == "transformers"  # which ``load`` takes for onnx there


def test_models_that_write_no_text_are_refused(tmp_path: Path) -> None:
    tiny.save(tmp_path / "t5", "T5Model", tiny.T5)
    with pytest.raises(CheckpointError, match="writes no text"):
        export(tmp_path / "t5", "onnx", tmp_path / "out")
