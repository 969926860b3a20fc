"""The machine: memory, processes, devices."""
