"""Benchmarks that need no trained model: the layer against its lower bound and other implementations, training steps,
scaling, and a profile. Begin with layer.py; clock.py measures the times."""
