"""Bottleneck layer between client and server (ResSFL, Li et al., CVPR 2022)."""

from __future__ import annotations

from mocosfl_priv import Defense, ModelConfig, parse_bottleneck


class BottleneckDefense(Defense):
    """A narrow layer at the cut (C4S2 by default); the control for defenses that also use one.

    layer: (noReLU)(K<kernel>)C<channels>S<stride>, as `model.bottleneck` in a configuration.
    """

    def __init__(self, layer: str = "C4S2") -> None:
        parse_bottleneck(layer)
        self.layer = layer

    def architecture(self, model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"bottleneck": self.layer})
