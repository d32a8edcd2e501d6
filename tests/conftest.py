"""What every test may count on."""

from __future__ import annotations

import signal

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a job in a shell's background inherits this, and so would children
    signal.signal(signal.SIGINT, signal.default_int_handler)
