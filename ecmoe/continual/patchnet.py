"""PatchNet: a small classifier of image patches, with an FFN or an expert choice layer in each block.

Letters: n images (C, H, W); T tokens of an image, its patches, of width d; f the hidden width of an FFN.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ecmoe.config import ConfigError
from ecmoe.model.moe import MoE
from ecmoe.model.vision import patchify


class PatchNet(nn.Module):
    """(n, C, H, W) -> (n, classes) logits.

    Args:
        shape: (C, H, W). patch: side of a patch, which must divide both sides of the image.
        make_ffn: () -> an FFN (n, T, d) -> (n, T, d), or an `MoE`; called for each of the `layers` blocks.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, patch: int, d: int, layers: int, make_ffn: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        C, H, W = shape
        if H % patch or W % patch:
            raise ConfigError(
                f"patch={patch} doesn't divide images of {H} x {W} pixels: use a number that divides both sides"
            )
        self.patch, self.tokens = patch, H * W // patch**2
        self.embed, self.position = nn.Linear(C * patch**2, d), nn.Parameter(0.02 * torch.randn(self.tokens, d))
        self.blocks = nn.ModuleList(Block(self.tokens, d, make_ffn()) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, C, H, W) -> (n, d); mask (n,) bool: False for images that only fill a batch up."""
        h = self.embed(patchify(x, self.patch)) + self.position  # (n, T, d)
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h.mean(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.features(x, mask))


class Block(nn.Module):
    """Tokens are mixed across an image (as in an MLP-Mixer), then each passes the FFN; both residual."""

    def __init__(self, tokens: int, d: int, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(d), nn.Linear(tokens, tokens)
        self.norm2, self.ffn = nn.LayerNorm(d), ffn

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, T, d), mask (n,) -> (n, T, d)."""
        h = h + self.mix(self.norm1(h).transpose(1, 2)).transpose(1, 2)
        x = self.norm2(h)
        if mask is None or not isinstance(self.ffn, MoE):
            return h + self.ffn(x)
        return h + self.ffn(x, mask=mask[:, None].expand(x.shape[:2]))


def dense_ffn(d: int, f: int) -> nn.Module:
    """Two matrices and no bias, like an expert of `MoE`."""
    return nn.Sequential(nn.Linear(d, f, bias=False), nn.GELU("tanh"), nn.Linear(f, d, bias=False))


def count(model: nn.Module) -> int:
    """Parameters, frozen ones too."""
    return sum(p.numel() for p in model.parameters())


def as_large(make: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """make(f), of the hidden width f that comes nearest to that many parameters; they grow linearly with f."""
    one, two = count(make(1)), count(make(2))
    return make(max(1, round(1 + (parameters - one) / (two - one))))
