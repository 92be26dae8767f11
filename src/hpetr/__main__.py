"""Run the command line as `python -m hpetr`, which torchrun takes as `-m hpetr`."""

from hpetr.cli.main import main

main()
