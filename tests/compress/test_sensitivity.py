"""Gradients at the sites' outputs, against ones kept by autograd in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compress.sensitivity import Lookups, sensitivities

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
BATCHES = [torch.arange(24).view(2, 12) % 50, torch.arange(36).view(3, 12) * 7 % 50]


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def forwards() -> list[Any]:
    return [lambda model, ids=ids: model(input_ids=ids) for ids in BATCHES]


def slow_gradients(model: nn.Module, name: str) -> list[Tensor]:
    """float32 [tokens, out] for each batch, one token's loss at a time."""
    random = torch.Generator().manual_seed(0)
    found = []
    for forward in forwards():
        outputs: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, __, y, kept=outputs: kept.append(y.requires_grad_(True))
        )
        logits = forward(model).logits
        handle.remove()
        chances = logits.detach().softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(chances, 1, generator=random).flatten()
        total = torch.zeros_like(outputs[0])
        for row, token in zip(logits.flatten(0, 1), drawn, strict=True):
            loss = -row.log_softmax(-1)[token]
            total += torch.autograd.grad(loss, outputs[0], retain_graph=True)[0]
        found.append(total.flatten(0, 1))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_against_one_token_at_a_time(name: str) -> None:
    found = sensitivities(tiny(), forwards(), NAMES)[name]
    slow = slow_gradients(tiny(), name)
    g = torch.cat(slow)
    torch.testing.assert_close(found.outputs, g.T @ g / len(g), rtol=1e-4, atol=1e-7)
    scale = g.square().mean()
    assert [len(t) for t in found.tokens] == [ids.numel() for ids in BATCHES]
    for tokens, gradients in zip(found.tokens, slow, strict=True):
        torch.testing.assert_close(tokens, gradients.square().mean(1) / scale, rtol=1e-4, atol=1e-6)


def test_sites_that_no_gradient_reaches_are_left_out() -> None:
    model = tiny()
    model.model.layers[0].unused = nn.Linear(4, 4)
    found = sensitivities(model, forwards(), [*NAMES, "model.layers.0.unused"])
    assert set(found) == set(NAMES)


def test_lookups_are_counted_where_they_happen() -> None:
    """OPT's table of positions is given the attention mask and works its rows out itself."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    model: Any = transformers.OPTForCausalLM(config).eval().requires_grad_(False)
    tables = ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
    found = sensitivities(model, forwards(), tables)
    ids = torch.cat([batch.flatten() for batch in BATCHES])
    torch.testing.assert_close(found[tables[0]].lookups, torch.bincount(ids, minlength=50) / 60)
    counting = Lookups({name: model.get_submodule(name).weight for name in tables})
    with counting:
        model(input_ids=BATCHES[0])
    rows = torch.zeros(18).index_fill(0, torch.arange(2, 14), 2.0)
    assert torch.equal(counting.seen[tables[1]], rows)
