"""The onnx exporter and runtime: our integers in nodes, logits, caches, generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers import TextStreamer

import compress
from compress.errors import CheckpointError
from compress.export import onnx_blocks, onnx_modules, onnx_session, onnx_trace
from compress.export.export import export
from compress.runtime import onnx as runtime
from compress.stored import Stored
from compress.verify import relative_difference
from compress.weights import Int8, LowRank, Quantized, Weight
from compress.weights.modeling_compressed import unpack_codes

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
ROUNDED = 0.2  # relative: what 8-bit activations may change in these models of wild weights


def quantized(bits: int, group: int, symmetric: bool, shape: tuple[int, int], seed: int) -> Weight:
    matrix = tiny.normal(*shape, seed=seed)
    asked = {"bits": bits, "group": group, "symmetric": symmetric}
    return compress.compressor("rtn", **asked)(matrix)


def in_onnxruntime(module: onnx_modules.Held, x: Tensor) -> np.ndarray:
    """One node, built by hand from what a module holds."""
    table = isinstance(module, onnx_modules.PackedTable)
    codes = module.codes.flatten(1) if table else module.codes
    tensors = {"codes": codes, "scale": module.scale.float(), "zero": module.zero}
    given = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    inputs = ["codes", "x", *list(given)[1:]] if table else ["x", *given]
    extra = {"gather_axis": 0, "quantize_axis": 1} if table else {}
    node = onnx.helper.make_node(
        "GatherBlockQuantized" if table else "MatMulNBits",
        inputs, ["y"], domain="com.microsoft", **module.numbers, **extra,
    )  # fmt: skip
    kind = onnx.TensorProto.INT64 if table else onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "one",
        [onnx.helper.make_tensor_value_info("x", kind, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in given.items()],
    )  # fmt: skip
    domains = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, 1 << 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_nodes_compute_with_our_numbers(bits: int, group: int, symmetric: bool) -> None:
    weight = quantized(bits, group, symmetric, (48, 200), bits * group)  # a short last group
    held = onnx_blocks.carried(weight)
    assert held is not None
    assert held.bits == {2: 4 if group == 16 else 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits]
    x = tiny.normal(3, 200, seed=1, scale=1.0)
    found = in_onnxruntime(onnx_modules.Packed(held, None, 0), x)
    assert torch.allclose(torch.from_numpy(found), x @ weight.dense().T, atol=1e-5)
    rows = torch.tensor([[0, 47, 5]])
    found = in_onnxruntime(onnx_modules.PackedTable(held), rows)
    assert torch.equal(torch.from_numpy(found[..., :200].copy()), weight.dense()[rows])


def test_what_has_no_blocks_is_expanded_and_int8_is_not() -> None:
    assert onnx_blocks.carried(quantized(4, 24, True, (8, 48), 0)) is None
    matrix = tiny.normal(8, 48)
    scale = matrix.abs().amax(1)
    codes = (matrix / scale[:, None] * 127).round().to(torch.int8)
    spec = {"kind": "int8", "shape": [8, 48], "dtype": "float32"}
    weight = Int8(spec, {"codes": codes, "SCB": scale})
    held = onnx_blocks.carried(weight)
    assert held is not None
    x = tiny.normal(2, 48, seed=1, scale=1.0)
    found = in_onnxruntime(onnx_modules.Packed(held, None, 0), x)
    assert torch.allclose(torch.from_numpy(found), x @ weight.dense().T, atol=1e-5)
    factors = LowRank.of(tiny.normal(8, 4), tiny.normal(4, 48), torch.float32)
    assert onnx_modules.held(factors) == "exactly"
    mixed = LowRank.join(factors.left, quantized(4, 24, True, (4, 48), 0), torch.float32)
    assert onnx_modules.held(mixed) == "expanded"


class Made:
    """A compressed folder, its export, and both loaded."""

    def __init__(self, folder: Path, kind: str, config: Any, stages: list[Any], **options: Any):
        tiny.save(folder / "original", kind, config)
        self.folder, self.out = folder / "compressed", folder / "onnx"
        recipe = {"stages": stages}
        compress.apply(recipe, model=str(folder / "original"), out=self.folder, verify=False)
        self.record = export(self.folder, "onnx", self.out, **options)
        self.stored = Stored(self.folder)
        self.model: Any = compress.load(self.folder, dtype=torch.float32)
        self.onnx = runtime.load(self.out)

    def initializers(self) -> dict[str, np.ndarray]:
        proto = onnx.load(self.out / onnx_session.FILE)
        return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every width of node, both kinds of grid, factors, zeros and a packed embedding."""
    config = transformers.LlamaConfig(
        **tiny.LLAMA.to_dict() | SMALL | {"num_key_value_heads": 1, "head_dim": 32}
    )
    per_site = {
        "*.k_proj": {"bits": 2, "group": 32},
        "*.v_proj": {"bits": 3, "group": 64},
        "*.gate_proj": {"bits": 8, "group": 64},
        "*.up_proj": {"bits": 4, "group": 16},
    }
    stages = [
        {"use": "magnitude", "sparsity": 0.5, "targets": ["o_proj"]},
        {"use": "svd", "rank": 24, "targets": ["down_proj"]},
        {"use": "rtn", "bits": 4, "group": 32, "symmetric": False, "overrides": per_site,
         "targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed"]},
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    return Made(folder, "LlamaForCausalLM", config, stages)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Conv1D, and an output head tied to a packed table; activations as they are."""
    stages = [{"use": "rtn", "bits": 4, "group": 16, "targets": ["all"]}]
    folder = tmp_path_factory.mktemp("gpt2")
    return Made(folder, "GPT2LMHeadModel", tiny.GPT2, stages, int8_activations=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Made:
    stages = [{"use": "rtn", "bits": 8, "group": "channel", "symmetric": False}]
    return Made(tmp_path_factory.mktemp("bert"), "BertForMaskedLM", tiny.BERT, stages)


@pytest.fixture(params=["llama", "gpt2", "bert"])
def made(request: pytest.FixtureRequest) -> Made:
    return request.getfixturevalue(request.param)


TOKENS = torch.randint(0, 2048, (3, 9), generator=torch.Generator().manual_seed(0))


def test_logits_are_those_of_the_folder(made: Made) -> None:
    assert made.record["difference"] < made.record["tolerance"]
    with torch.no_grad():
        expected = made.model(TOKENS).logits
    found = made.onnx(TOKENS).logits
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    allowed = ROUNDED if "differences" in made.record else made.record["tolerance"]
    assert relative_difference(found.flatten(), expected.flatten()) < allowed
    with onnx_session.unrounded(made.out / onnx_session.FILE) as file:
        exact = onnx_session.logits(file, TOKENS)
    assert relative_difference(exact.flatten(), expected.flatten()) < made.record["tolerance"]
    assert sorted(p.name for p in made.out.glob("*.onnx*")) == ["model.onnx", "model.onnx.data"]


def test_initializers_are_our_integers(llama: Made, bert: Made) -> None:
    checked = 0
    for made in (llama, bert):
        known = made.initializers()
        for site in made.stored.anatomy.sites:
            weight = made.stored.weight(site)
            if not isinstance(weight, Quantized):
                continue
            held = onnx_blocks.carried(weight)
            assert held is not None
            codes = next((v for k, v in known.items() if k == f"{site.name}.codes"), None)
            if codes is None:  # a table's, which is reshaped
                wanted = held.codes.numpy().tobytes()
                codes = next(array for array in known.values() if array.tobytes() == wanted)
            per_byte = 8 // held.bits
            shifts = np.arange(per_byte, dtype=np.uint8) * held.bits
            numbers = (codes[..., None] >> shifts) & ((1 << held.bits) - 1)
            rows, columns = site.shape
            signed = numbers.reshape(rows, -1)[:, :columns].astype(int) - (1 << (held.bits - 1))
            assert (signed == unpack_codes(weight.spec, weight.tensors).numpy()).all(), site.name
            checked += 1
    assert checked > 15
    assert llama.record["held"] == {"exactly": 12, "expanded": 4}


def test_padding_and_caches_change_nothing(llama: Made, gpt2: Made) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    for made in (llama, gpt2):
        whole = made.onnx(TOKENS, attention_mask=mask).logits
        cache = runtime.OnnxCache()
        parts = [
            made.onnx(TOKENS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))
        ]
        assert cache.get_seq_length() == 9
        kept = mask.bool()
        stepwise = torch.cat(parts, 1)[kept]
        assert relative_difference(stepwise.flatten(), whole[kept].flatten()) < 1e-5
        alone = made.onnx(TOKENS[:1, 3:]).logits  # what is padded is not seen
        assert relative_difference(alone.flatten(), whole[0, 3:].flatten()) < 1e-5


def test_generates_what_transformers_does(gpt2: Made, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for model in (gpt2.onnx, gpt2.model):
        model.generation_config.eos_token_id = None
    found = gpt2.onnx.generate(TOKENS, **settings)
    assert torch.equal(found, gpt2.model.generate(TOKENS, **settings))
    streamer = TextStreamer(compress.load_tokenizer(gpt2.out))
    sampled = gpt2.onnx.generate(
        TOKENS[:1], max_new_tokens=4, do_sample=True, temperature=0.7, streamer=streamer
    )
    assert sampled.shape == (1, 13)
    assert capsys.readouterr().out
    with pytest.raises(compress.CompressError, match="num_beams"):
        gpt2.onnx.generate(TOKENS, num_beams=2, max_new_tokens=2)


GROUPED = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DECODERS = {
    "groups": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "norms of heads": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "a window": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "narrow heads": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"head_dim": 4}),
    "capped scores": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_and_without_a_cache_in_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and text of a padded batch are transformers', over several lengths of the buffer."""
    kind, config, numbers = DECODERS[name]
    base = {key: tiny.LLAMA.to_dict()[key] for key in ("vocab_size", "max_position_embeddings")}
    base |= {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
    stages = [{"use": "rtn", "bits": 8, "group": 32, "targets": ["gate_proj"]}]
    asked = getattr(transformers, config)(**base | numbers)
    made = Made(tmp_path, kind, asked, stages, int8_activations=False)
    in_place = name not in ("narrow heads", "capped scores")
    proto = onnx.load(made.out / onnx_session.FILE, load_external_data=False)
    nodes = [node.op_type for node in proto.graph.node]
    assert nodes.count("GroupQueryAttention") == (2 if in_place else 0)
    assert made.onnx.session.shared == in_place

    monkeypatch.setattr(onnx_session, "ROOM", 4)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :3] = mask[2, :1] = 0
    settings: dict[str, Any] = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0}
    for model in (made.onnx, made.model):
        model.generation_config.eos_token_id = None
    found = made.onnx.generate(TOKENS, attention_mask=mask, **settings)
    assert torch.equal(found, made.model.generate(TOKENS, attention_mask=mask, **settings))

    mask = torch.nn.functional.pad(mask, (0, 11), value=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = made.model(found, attention_mask=mask, position_ids=places).logits
    cache = runtime.OnnxCache()
    parts = [
        made.onnx(found[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 7), (7, 8), (8, 13), (13, 20))
    ]
    kept = mask.bool()
    stepwise = torch.cat(parts, 1)[kept]
    assert relative_difference(stepwise.flatten(), expected[kept].flatten()) < 1e-5


def test_logits_only_of_the_last_tokens(llama: Made, gpt2: Made) -> None:
    for made in (llama, gpt2):
        whole = made.onnx(TOKENS).logits
        feeds = onnx_session.text_feeds(TOKENS) | {onnx_session.LOGITS_FROM: torch.tensor([-2])}
        last = made.onnx.session.run(feeds)
        assert last.shape == (3, 2, whole.shape[2])
        assert relative_difference(last.flatten(), whole[:, -2:].flatten()) < 1e-5
        assert made.onnx(TOKENS, logits_to_keep=1).logits.shape == (3, 1, whole.shape[2])


def test_a_cache_that_grows_keeps_what_it_holds(
    llama: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "ROOM", 4)
    cache = runtime.OnnxCache()
    llama.onnx(TOKENS[:, :4], past_key_values=cache)
    before = cache.values[0].numpy().copy()
    llama.onnx(TOKENS[:, 4:5], past_key_values=cache)
    after = cache.values[0]
    assert after.shape()[2] == 8
    assert np.array_equal(after.numpy()[:, :, :4], before)
    llama.onnx(TOKENS[:, 5:6], past_key_values=cache)
    assert cache.values[0] is after  # and nothing is copied in between
    assert not np.array_equal(after.numpy()[:, :, 5], np.zeros_like(before[:, :, 0]))


def test_a_checkpoint_is_exported_once(
    bert: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[Path] = []

    def copied(folder: Path, to: str, out: Path) -> None:
        calls.append(out)
        shutil.copytree(bert.out, out)

    monkeypatch.setattr(runtime, "export", copied)
    first, second = (runtime.load(bert.folder) for _ in range(2))
    assert len(calls) == 1
    assert not first.can_generate()
    assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "llama", "LlamaForCausalLM", tiny.LLAMA)
    monkeypatch.setattr(onnx_trace, "required", Broken)
    with pytest.raises(CheckpointError, match=r"does not export LlamaForCausalLM.*no such node"):
        export(tmp_path / "llama", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"onnxruntime .* does not load it"):
        onnx_session.Session(tmp_path / "bad.onnx")


class Broken:
    """In place of transformers' exporter: one that fails."""

    def __init__(self, *_: Any) -> None: ...

    OnnxConfig = dict

    class OnnxExporter:
        def export(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no such node\nand a long trace")
