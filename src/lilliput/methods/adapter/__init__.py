"""Adapters: what is trained beside a finished folder that stays as it is."""
