"""What is measured on trained models, once, and kept beside their records.

measure.py keeps; each other file is one question that needs a run's weights."""
