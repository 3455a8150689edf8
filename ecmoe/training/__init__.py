"""Training: `run_or_load` loads the result of a finished run or trains a missing one, and never loses finished work.

Start with run.py, which trains a config and writes its summary. lit.py holds the LightningModules, recorder.py writes
curve and checkpoints during training, result.py stores and loads finished runs. ecmoe/study compares their losses."""
