"""`python -m hdnn_dist` is `hdnn-dist`."""

from hdnn_dist.cli import main

main()
