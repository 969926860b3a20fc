"""The command line: arguments to calls of the interface, nothing else."""
