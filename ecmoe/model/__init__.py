"""The Transformer of section 3.4 and its parts: moe.py implements Eq. 3 and 4, transformer.py assembles the layers.

Nothing in this package depends on how a model is trained; see ecmoe/training for that."""
