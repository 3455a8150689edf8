"""The Transformer of section 3.4 and its parts. moe.py is Eq. 3 and 4; transformer.py puts the layers together.

Nothing here knows how a model is trained."""
