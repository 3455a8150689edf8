"""Problems for the kernels, and the oracle that they are held to: on a GPU where there is one, else in the interpreter."""

import torch
from torch.nn import functional as F

from ecmoe.kernels import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative norms: float32 sums in another order; bf16 rounds each of some five results to 2^-9.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
WHOLE, ODD = (24, 16, 32, 4, 12), (23, 5, 9, 3, 7)  # n, d, f, e, k; the fused products take whole 16 bytes


def problem(n, d, f, e, k, dtype, seed=0):
    """x, w1, w2, token, gate, and a gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    x, w1, w2 = (torch.randn(*s, generator=g) * s[-2] ** -0.5 for s in ((n, d), (e, d, f), (e, f, d)))
    token = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(e)])
    gate = torch.rand(e, k, generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (x * n**0.5, w1, w2)]
    gradient = torch.randn(n, d, generator=g).to(DEVICE, dtype)
    return *tensors, token.to(DEVICE), gate.to(DEVICE, wide).requires_grad_(), gradient


def one_hot(x, w1, w2, token, gate):
    """Eq. 3 and 4 by einsum."""
    P = F.one_hot(token, len(x) + 1)[..., :-1].to(x.dtype)
    h = F.gelu(torch.einsum("ekn,nd,edf->ekf", P, x, w1), approximate="tanh")
    return torch.einsum("ekn,ek,ekf,efd->nd", P, gate, h, w2)


def with_gradients(function, x, w1, w2, token, gate, gradient):
    out = function(x, w1, w2, token, gate)
    return out, *torch.autograd.grad(out, [x, w1, w2, gate], gradient)


def oracle(x, w1, w2, token, gate, gradient):
    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2, gate)]
    return with_gradients(one_hot, *wide[:3], token, wide[3], gradient.double())


def distance(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def assert_near(ours, theirs, dtype):
    for name, a, b in zip(("out", "x", "w1", "w2", "gate"), ours, theirs, strict=True):
        assert distance(a, b) < TOLERANCE[dtype], name


def spoil_new_memory(monkeypatch) -> None:
    """New memory holds, and lies within, what spoils all that reads it: no numbers, and whole ones that are no places."""

    def spoiled(shape, dtype, device) -> torch.Tensor:
        size = torch.Size(shape)
        whole = torch.full(
            (size.numel() + 128,), torch.nan if dtype.is_floating_point else 99, dtype=dtype, device=device
        )
        return whole[64:-64].view(size)

    def like(t, dtype=None, **_):
        return spoiled(t.shape, dtype or t.dtype, t.device)

    def new(t, *shape, dtype=None, device=None):
        return spoiled(shape[0] if isinstance(shape[0], list | tuple) else shape, dtype or t.dtype, device or t.device)

    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new)
