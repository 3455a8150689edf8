"""Data: from a corpus to batches of tokens, images, and the classification tasks for fine-tuning.

Text passes through corpus.py (documents), tokens.py (split, cached as token ids of tokenizer.py) and batches.py;
clusters.py makes up tasks for text. images.py loads and batches images; tasks.py loads fine-tuning examples."""
