"""`python -m sdcompile`."""

from sdcompile.cli import main

main()
