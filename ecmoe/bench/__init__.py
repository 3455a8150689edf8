"""On the clock: the layer against its floor and its rivals, its kernels one by one, and whole training steps.

What is timed here depends on nothing that was trained. The clock is clock.py; read layer.py first."""
