"""Corpus to batches: text from files or the Hub, its tokens, images, and the tasks of fine-tuning.

batches.py is what training reads; everything before it turns a corpus into tokens whose digest is their content's."""
