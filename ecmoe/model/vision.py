"""A Vision Transformer with an MoE in every other layer, which routes patches (V-MoE, Riquelme et al. 2021).

The blocks are those of the language model, with attention over all patches. Our choices for a small model: RMSNorm,
gated FFNs where there are no experts, the mean over patches instead of a class token.

Letters: B images of C channels, H x W pixels; T patches of P x P pixels; width d.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecmoe.config import RunConfig
from ecmoe.model.transformer import Trunk


class PatchEmbedding(nn.Module):
    """(B, C, H, W) images in [0, 1] -> (B, T, d): a linear map of each patch plus a learned vector per position.
    Patches are taken row by row, each channel by channel (T = H W / P^2)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.size = config.patch_size
        self.patch = nn.Linear(config.channels * config.patch_size**2, config.d_model, bias=False)
        self.position = nn.Parameter(torch.empty(config.sequence_length, config.d_model))

    def forward(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(2 * images - 1, self.size).flatten(2).transpose(1, 2).contiguous()  # (B, T, C P P)
        return self.patch(patches.to(self.position.dtype)) + self.position


class VisionTransformer(Trunk):
    """Image classifier: (B, C, H, W) in [0, 1] -> (B, classes) logits."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, PatchEmbedding(config))
        self.head = nn.Linear(config.d_model, config.classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the (B, d) input of the head: the mean over patches."""
        return self.through(self.embedding(images)).mean(dim=1)

    def _initial_std(self, name: str, parameter: Tensor) -> float | None:
        if name == "embedding.position":
            return 0.1  # small compared with embedded patches, which are about 1
        if name in ("embedding.patch.weight", "head.weight"):
            return parameter.shape[1] ** -0.5
        return super()._initial_std(name, parameter)
