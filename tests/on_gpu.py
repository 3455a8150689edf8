"""What tests of branches for GPUs use, where there is none."""

from torch import Tensor


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU: `x.as_subclass(OnGPU)`."""

    is_cuda = True
