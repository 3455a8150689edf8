"""run_or_load: train what is missing, load what is there. Lightning's side of it, and how a run is kept."""
