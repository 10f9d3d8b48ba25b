"""`ssl-seg`, `python -m ssl_seg`, `torchrun -m ssl_seg`, `accelerate launch -m ssl_seg`.

Before anything is imported, since that takes its time: Ctrl-C ends it with a line, and not with a traceback.
"""

import os
import signal


def _stop(signum: int, _: object) -> None:
    os.write(2, b"ssl-seg: SIGINT: stopped\n")
    os._exit(128 + signum)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)

from ssl_seg.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
