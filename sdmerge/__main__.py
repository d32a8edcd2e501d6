"""``python -m sdmerge`` is the command line."""

from sdmerge.cli import main

main()
