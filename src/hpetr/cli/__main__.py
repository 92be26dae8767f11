"""Run the command line as `python -m hpetr.cli`."""

from hpetr.cli.main import main

main()
