"""`python -m flowar VERB ...` is the `flowar` command."""

from flowar.cli import main

main()
