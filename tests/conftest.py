"""What all tests rest on."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell starts background jobs with SIGINT ignored (nohup: SIGHUP), programs inherit that, and
# mtetool respects it. The tests that send signals mean programs that came without.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
