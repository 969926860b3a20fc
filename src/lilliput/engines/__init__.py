"""Programs of others that run a finished folder: what vLLM loads of ours, and which server fits."""
