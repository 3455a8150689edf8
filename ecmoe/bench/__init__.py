"""Benchmarks: the layer against its lower bound and other implementations, training steps, scaling, and a profile.

None of them needs a trained model. Begin with layer.py; clock.py measures the times."""
