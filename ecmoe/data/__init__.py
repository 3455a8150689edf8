"""Data: from a corpus to batches of tokens, images, and the classification tasks for fine-tuning.

Text passes through corpus.py (documents), split.py (training and validation), tokenizer.py, tokens.py (cached token
ids) and batches.py. images.py loads and batches images; tasks.py loads fine-tuning examples."""
