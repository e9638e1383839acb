"""`python -m distmerge` and `torchrun -m distmerge` are `distmerge`."""

from distmerge.cli.main import main

main()
