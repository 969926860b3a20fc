"""How what enters a linear is rounded while the model runs: one file a kind, all of them listed in `known.py`."""
