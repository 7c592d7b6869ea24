"""A small vision transformer of torchvision, to be cut after its second block: smashed data is tokens (n, 65, 96)."""

from torch import nn
from torchvision.models import VisionTransformer

CUT = "encoder.layers.encoder_layer_1"


def split() -> nn.Module:
    """Return the whole network, for images of 64 pixels, with random weights."""
    return VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=192, num_classes=10
    )
