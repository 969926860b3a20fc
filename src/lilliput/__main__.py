"""`python -m lilliput`, and so `torchrun -m lilliput`, is the `lilliput` command."""

from lilliput.cli.main import main

main()
