"""`python -m lilliput`, and so `torchrun -m lilliput`, is the `lilliput` command."""

from lilliput.cli import main

main()
