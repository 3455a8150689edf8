"""Products by QuACK (github.com/Dao-AILab/quack), for kernels="cute": `pip install "quack-kernels[cu13]"`.

Of two groups of warps, one multiplies while the other activates and writes, which Triton can't express: at 0.1B/64E on
an H200, x_in w1 with the activation takes 0.95 of the time that cuBLAS takes without. The two products that write or
read slopes stay Triton's, because QuACK, with the same work in its epilogue, was hardly faster.
"""

import torch
from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecLoad
from quack.gemm_config import GemmConfig
from torch import Tensor
from torch.nn import functional as F

_USUAL = {"cluster_m": 2, "cluster_n": 1, "is_dynamic_persistent": False}
# Constants, because QuACK remembers a launch by its config object. The large tile loads less, and pays if it is deep.
SHALLOW = GemmConfig(tile_m=128, tile_n=192, pingpong=True, **_USUAL)
DEEP, DEPTH = GemmConfig(tile_m=256, tile_n=192, pingpong=False, **_USUAL), 4096


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return a b, (e, m, k) x (e, k, n) -> (e, m, n), in `dtype` (default: that of a), written to `out` if given."""
    out = a.new_empty(*a.shape[:2], b.shape[2], dtype=dtype) if out is None else out
    _product(a, b, out={"D": out}, tuned=False, config=_tile(a))
    return out


def activated(x_in: Tensor, w1: Tensor, gate: Tensor) -> Tensor:
    """Return a = gate gelu(x_in w1), (e, k, f); gate: (e, k), float32."""
    (e, k), f = gate.shape, w1.shape[2]
    if k % 4:  # QuACK wants rows that begin at whole 16 bytes
        gate = F.pad(gate, (0, -k % 4))[:, :k]
    a = x_in.new_empty(e, k, f)
    _activated(x_in, w1, out={"D": a}, gate=gate, tuned=False, config=_tile(x_in))
    return a


def _tile(a: Tensor) -> GemmConfig:
    return DEEP if a.shape[2] >= DEPTH else SHALLOW


@gemm_epilogue()
def _product(acc):
    return {"D": acc}


@gemm_epilogue(ops={"gate": ColVecLoad("gate")})
def _activated(acc, gate):
    return {"D": gelu_tanh_approx(acc) * gate}
