"""Models of many families taken apart: roles, counts, ties, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import transformers
from accelerate import init_empty_weights
from torch import nn

from compress.anatomy import Anatomy, anatomize, matches, select
from compress.errors import ModelError, RecipeError

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 16}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PLAIN = [*ATTENTION, "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
BERT = ["embed", "positions", "positions", "dense"]
UNTIED = ["embed", "head"]
# model class → config class, its arguments, layers, roles in each layer, roles outside of layers
FAMILIES: dict[str, tuple[str, dict[str, Any], int, list[str], list[str]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, 2, LLAMA, UNTIED),
    "MistralForCausalLM": ("MistralConfig", GROUPED, 2, LLAMA, UNTIED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, 2, LLAMA, UNTIED),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED, 2, LLAMA, UNTIED),
    "GemmaForCausalLM": ("GemmaConfig", GEMMA, 2, LLAMA, ["embed"]),
    "Gemma2ForCausalLM": ("Gemma2Config", GEMMA, 2, LLAMA, ["embed"]),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GEMMA, 2, LLAMA, ["embed"]),
    "PhiForCausalLM": ("PhiConfig", SIZES, 2, PLAIN, UNTIED),
    "Phi3ForCausalLM": (
        "Phi3Config", GROUPED, 2, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], UNTIED,
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES, 2, FUSED, UNTIED),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
         "eos_token_id": 2},
        2, FUSED, ["embed", "positions"],
    ),
    "OPTForCausalLM": (
        "OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, 2, PLAIN,
        ["embed", "positions"],
    ),
    "BertForMaskedLM": ("BertConfig", SIZES, 2, PLAIN, BERT),
    "BertForSequenceClassification": ("BertConfig", SIZES, 2, PLAIN, [*BERT, "head"]),
    "RobertaForMaskedLM": ("RobertaConfig", SIZES, 2, PLAIN, BERT),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        2, PLAIN, ["embed", "positions", "vocab_transform"],
    ),
    "ViTForImageClassification": (
        "ViTConfig",
        {k: v for k, v in SIZES.items() if "token" not in k and k != "vocab_size"}
        | {"image_size": 32},
        2, PLAIN, ["head"],
    ),
}  # fmt: skip
TIED = {
    "GPT2LMHeadModel": ("transformer.wte", "lm_head"),
    "OPTForCausalLM": ("model.decoder.embed_tokens", "lm_head"),
    "GemmaForCausalLM": ("model.embed_tokens", "lm_head"),
    "Gemma2ForCausalLM": ("model.embed_tokens", "lm_head"),
    "Gemma3ForCausalLM": ("model.embed_tokens", "lm_head"),
    "BertForMaskedLM": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "RobertaForMaskedLM": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "DistilBertForMaskedLM": ("distilbert.embeddings.word_embeddings", "vocab_projector"),
}


def build(kind: str, config: str, arguments: dict[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, kind)(getattr(transformers, config)(**arguments))
    model.tie_weights()
    return model


def roles(anatomy: Anatomy, number: int) -> Counter[str]:
    return Counter(site.role for site in anatomy.blocks[number].sites)


@pytest.mark.parametrize("kind", FAMILIES)
def test_roles_and_counts(kind: str) -> None:
    config, arguments, layers, inside, outside = FAMILIES[kind]
    model = build(kind, config, arguments)
    anatomy = anatomize(model)
    assert anatomy.layers == layers
    assert [block.index for block in anatomy.blocks] == [None, 0, 1]
    for number in (1, 2):
        assert roles(anatomy, number) == Counter(inside)
    assert roles(anatomy, 0) == Counter(outside)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_has_one_place(kind: str) -> None:
    config, arguments, *_ = FAMILIES[kind]
    model = build(kind, config, arguments)
    anatomy = anatomize(model)
    placed = [name for block in anatomy.blocks for name in block.tensors]
    assert len(placed) == len(set(placed))
    assert set(placed) | set(anatomy.aliases) == set(model.state_dict())
    for site in anatomy.sites:
        rows, columns = model.get_parameter(site.parameter).shape
        assert site.shape == ((columns, rows) if site.layout == "conv1d" else (rows, columns))
        assert (site.layout == "embedding") == (site.role in ("embed", "positions"))
    assert any(site.layout == "conv1d" for site in anatomy.sites) == (kind == "GPT2LMHeadModel")


@pytest.mark.parametrize("kind", FAMILIES)
def test_ties_are_found_and_counted_once(kind: str) -> None:
    config, arguments, *_ = FAMILIES[kind]
    anatomy = anatomize(build(kind, config, arguments))
    tied = [site for site in anatomy.sites if site.aliases]
    if kind not in TIED:
        assert tied == []
        return
    name, alias = TIED[kind]
    assert [(site.name, site.aliases) for site in tied] == [(name, (alias,))]
    assert tied[0].tied_roles == ("head",)
    assert anatomy.aliases[f"{alias}.weight"] == f"{name}.weight"
    assert matches(tied[0], "head")
    assert matches(tied[0], "embed")
    assert matches(tied[0], alias)


def test_untied_by_the_config() -> None:
    anatomy = anatomize(
        build("GemmaForCausalLM", "GemmaConfig", {**GEMMA, "tie_word_embeddings": False})
    )
    assert anatomy.aliases == {}
    assert roles(anatomy, 0) == Counter(UNTIED)


@pytest.mark.parametrize(
    ("act", "feed"),
    [("relu", ["up_proj", "down_proj"]), ("gated-gelu", ["gate_proj", "up_proj", "down_proj"])],
)
def test_t5_has_encoder_and_decoder_layers(act: str, feed: list[str]) -> None:
    arguments = {**T5, "feed_forward_proj": act}
    anatomy = anatomize(build("T5ForConditionalGeneration", "T5Config", arguments))
    assert anatomy.layers == 4
    assert roles(anatomy, 2) == Counter([*ATTENTION, *feed])
    assert roles(anatomy, 4) == Counter([*ATTENTION, *ATTENTION, *feed])
    assert roles(anatomy, 1) - roles(anatomy, 2) == Counter(["relative_attention_bias"])
    (shared,) = anatomy.blocks[0].sites
    assert (shared.name, shared.role) == ("shared", "embed")
    assert set(shared.aliases) == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}


def test_whisper_has_encoder_and_decoder_layers() -> None:
    arguments = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    anatomy = anatomize(build("WhisperForConditionalGeneration", "WhisperConfig", arguments))
    assert roles(anatomy, 1) == Counter(PLAIN)
    assert roles(anatomy, 3) == Counter([*ATTENTION, *PLAIN])
    assert roles(anatomy, 0) == Counter(["embed", "positions", "positions"])


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_fused_experts_are_refused_by_name(kind: str) -> None:
    arguments = {**GROUPED, "num_local_experts": 2, "num_experts": 2}
    model = build(f"{kind}ForCausalLM", f"{kind}Config", arguments)
    with pytest.raises(ModelError, match=rf"{kind}ForCausalLM: model.layers.0.mlp\S+ \[.*{kind}"):
        anatomize(model)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential: found no layers"):
        anatomize(nn.Sequential(nn.Linear(4, 4)))


# which sites a stage takes


@pytest.fixture(scope="module")
def twelve() -> Anatomy:
    arguments = {**GROUPED, "num_hidden_layers": 12}
    return anatomize(build("LlamaForCausalLM", "LlamaConfig", arguments))


def names(anatomy: Anatomy, targets: list[str], **more: Any) -> list[str]:
    options = {"skip": [], "blocks": None} | more
    return [s.name for s in select(anatomy.sites, targets, layers=anatomy.layers, **options)]


def test_patterns(twelve: Anatomy) -> None:
    assert len(names(twelve, ["blocks"])) == 12 * 7
    assert len(names(twelve, ["attention"])) == 12 * 4
    assert len(names(twelve, ["mlp"])) == 12 * 3
    assert len(names(twelve, ["all"])) == 12 * 7 + 2
    assert names(twelve, ["head", "embed"]) == ["model.embed_tokens", "lm_head"]
    assert len(names(twelve, ["q_proj", "model.layers.3.mlp.up_proj"])) == 13
    assert len(names(twelve, ["all"], skip=["mlp", "embed"])) == 12 * 4 + 1
    assert len(names(twelve, [r"re:layers\.(0|11)\."])) == 14


def test_layer_1_is_not_layer_10(twelve: Anatomy) -> None:
    found = names(twelve, ["model.layers.1.*"])
    assert len(found) == 7
    assert all(name.startswith("model.layers.1.") for name in found)


def test_block_numbers_count_from_either_end(twelve: Anatomy) -> None:
    found = names(twelve, ["q_proj"], blocks=[0, 3, -1])
    assert found == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 3, 11)]
    for number in (12, -13):
        with pytest.raises(RecipeError, match=f"no layer {number}; this model has 12"):
            names(twelve, ["q_proj"], blocks=[number])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_porj", "matches no weight of this model; did you mean 'q_proj'"),
        ("layers.1", "matches no weight"),
        ("model.layers.12.*", "matches no weight"),
        ("re:layers.(", "'re:layers.\\(' is not a regular expression"),
    ],
)
def test_patterns_that_match_nothing_are_errors(
    twelve: Anatomy, pattern: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        names(twelve, [pattern])
    with pytest.raises(RecipeError, match=message):
        names(twelve, ["all"], skip=[pattern])


def test_nothing_left_is_an_error(twelve: Anatomy) -> None:
    with pytest.raises(RecipeError, match="leave no weight"):
        names(twelve, ["mlp"], skip=["blocks"])
    with pytest.raises(RecipeError, match="leave no weight"):
        names(twelve, ["head"], blocks=[0])
