"""``python -m sdmerge.train`` is ``sdmerge train``, so that ``accelerate launch -m sdmerge.train …`` works."""

import sys

from sdmerge.cli import main

main(["train", *sys.argv[1:]])
