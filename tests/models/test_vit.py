from __future__ import annotations

import pytest
import torch
from torchvision.models.vision_transformer import EncoderBlock

from mocosfl_priv.models.layers import LayerOptions
from mocosfl_priv.models.vit import TRANSFORMERS, TransformerBlock, _heads, sine_cosine_positions


def test_a_block_computes_what_torchvisions_does() -> None:
    theirs = EncoderBlock(num_heads=3, hidden_dim=24, mlp_dim=96, dropout=0.0, attention_dropout=0.0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = TransformerBlock(24, heads=3).double()
    names = {
        "ln_1": "norm1", "ln_2": "norm2", "self_attention.in_proj_": "attention.qkv.",
        "self_attention.out_proj": "attention.out", "mlp.3": "mlp.2",
    }  # fmt: skip
    state = {}
    for name, value in theirs.state_dict().items():
        for theirs_is, ours_is in names.items():
            name = name.replace(theirs_is, ours_is)  # noqa: PLW2901
        state[name] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 24, 4, 5, dtype=torch.float64)
    expected = theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(ours(x), expected)


def test_positions_tell_every_place_apart() -> None:
    positions = sine_cosine_positions(192, 8)
    assert positions.shape == (192, 8, 8)
    assert float(torch.pdist(positions.flatten(1).T).min()) > 0.5
    torch.testing.assert_close(positions.square().sum(0), torch.full((8, 8), 96.0))
    # the first half knows the row only, the second the column only
    assert torch.equal(positions[:96, :, 0], positions[:96, :, 7])
    assert torch.equal(positions[96:, 0], positions[96:, 7])


@pytest.mark.parametrize(("channels", "heads"), [(192, 3), (384, 6), (64, 1), (8, 1), (100, 1), (132, 2)])
def test_one_head_per_64_channels(channels: int, heads: int) -> None:
    assert _heads(channels) == heads


def test_the_last_unit_ends_in_a_norm_over_channels() -> None:
    units = TRANSFORMERS["vit_tiny"].build(16, 32, LayerOptions())
    tokens = units[-1](torch.randn(2, 16, 8, 8))
    torch.testing.assert_close(tokens.mean(1), torch.zeros(2, 8, 8), atol=1e-5, rtol=0)
