"""`python -m distmerge` and `torchrun -m distmerge` are `distmerge`."""

from distmerge.cli import main

main()
