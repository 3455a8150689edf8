"""The fast path of `MoE` on a GPU, in Triton: the six matrix products, and as few passes around them as possible.

Letters: n tokens x of width d, e experts of hidden width f, k slots of an expert, P (e k, n) of Eq. 3.

    forward                                                backward
    x_in = P x                              gather         dy = P dout, dgate = dy . y / gate              gather
    h = x_in w1                             product        da = dy w2^T                                    product
    a = gate gelu(h), slope = gelu'(h)      its epilogue   dh = gate da slope                              its epilogue
    y = a w2                                bmm            dw2 = a^T dy, dw1 = x_in^T dh, dx_in = dh w1^T  bmm
    out = P^T y                             combine        dx = P^T dx_in                                  combine

The gate is part of a, so combine is a plain sum. It adds a token's experts in their order, in float32, without
atomics: the same input gives the same bits. x_in, a, slope and y are kept for the backward pass, which writes dh over
a, and dy and dx_in over y. A slope lies within -0.13..1.13 and takes 8 bits if a takes 16. Shapes don't depend on the
data and nothing waits for the device, so CUDA graphs and torch.compile work.

    layer.py      the operator above                     product.py    its two fused products; cute.py: or by QuACK
    choice.py     a whole expert choice layer            routing.py    the router's logits
    rows.py       gather, combine, activation
    selection.py  top-k without a sort                   capped.py     top-k under a cap on a token's experts
    attention.py  attention with a bias by distance      loss.py       the loss of a chunk of logits, and its gradient
    common.py     kernel launches, operators

`experts`, `logits` and `select` each replace a line of the plain path, `expert_choice` replaces all of it. The plain
path (moe.py, routing/) is the readable reference: tests/kernels compares the kernels with it, without a GPU in
Triton's interpreter (TRITON_INTERPRET=1). On a GPU, run `pytest tests/kernels`, then `ecmoe bench layer`.
"""

from ecmoe.kernels.choice import expert_choice
from ecmoe.kernels.common import INTERPRETED
from ecmoe.kernels.layer import experts
from ecmoe.kernels.routing import logits
from ecmoe.kernels.selection import select

__all__ = ["INTERPRETED", "expert_choice", "experts", "logits", "select"]
