"""The sizes of a chain of calls (`mtetool.attach.chain`), and the room it takes in a process."""

from __future__ import annotations

MOST_CALLS = 2048
"""The most calls in one chain."""

STRIDE_BYTES = 1152
"""From one frame to the next: a signal frame with FP and POE records and a terminator."""

ARGUMENT_BYTES = 48
"""From one argument to the next: the size of struct kvm_arm_copy_mte_tags, the largest chained."""

ROOM_BYTES = (MOST_CALLS + 1) * STRIDE_BYTES + MOST_CALLS * ARGUMENT_BYTES
"""The room of a chain's frames and arguments."""
