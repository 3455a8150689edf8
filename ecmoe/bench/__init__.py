"""On the clock: the layer against its floor and its rivals, whole training steps, growth with each size, a profile.

What is timed here depends on nothing that was trained. The clock is clock.py; read layer.py first."""
