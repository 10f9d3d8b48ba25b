"""`python -m ssl_seg`, `torchrun -m ssl_seg`, `accelerate launch -m ssl_seg`."""

from ssl_seg.cli import main

main()
