"""`python -m hpetr.cli`, as torchrun starts it."""

from hpetr.cli.main import main

main()
