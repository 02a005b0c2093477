"""`python -m rondel.cli` is the same program as `rondel`."""

from rondel.cli.main import main

main()
