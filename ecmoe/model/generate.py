"""Token-by-token generation with a key-value cache."""

from contextlib import ExitStack

import torch
from torch import Tensor

from ecmoe.model.transformer import Cache, Transformer
from ecmoe.routing import causal_routing


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return (B, T + tokens): prompts with sampled continuations, each on its own, as routing is causal.

    Args:
        model: a trained model; expert choice routes by the cut-offs that it gathered in training.
        prompt: (B, T) int64, T at least 1. tokens: number of tokens to add.
        temperature: 0 always takes the most likely token. top_k: sample from the k most likely tokens only.

    Raises:
        ValueError: the prompt is empty, a setting is out of range, or the model has no cut-offs yet.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: must be (B, T) with at least one token")
    if tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        given = f"tokens={tokens}, temperature={temperature}, top_k={top_k}"
        raise ValueError(f"{given}: must not be negative; top_k at least 1")
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    cache: Cache = [[] for _ in model.blocks]
    out = new = prompt
    with causal_routing(model), ExitStack() as after:
        after.callback(model.train, model.training)  # also after an error
        model.eval()
        for _ in range(tokens):
            logits = model(new, cache=cache)[:, -1].float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature == 0:
                new = logits.argmax(dim=1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
            out = torch.cat([out, new], dim=1)
    return out
