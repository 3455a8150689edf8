"""run_or_load: train what is missing, load what is there, and lose nothing that was finished.

run.py is the way from a config to a summary; lit.py is Lightning's side of it, recorder.py what is written while it runs,
result.py what is read afterwards. Losses are made here, and compared in study/."""
