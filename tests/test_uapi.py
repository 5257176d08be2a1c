"""The kernel's numbers, as measured on Linux 6.12 and as its C compiler lays them out."""

from __future__ import annotations

import struct

from mtetool import uapi


def test_request_numbers() -> None:
    assert uapi.KVM_ARM_MTE_COPY_TAGS == 0x8030AEB4
    assert uapi.KVM_ENABLE_CAP == 0x4068AEA3
    assert uapi.KVM_CREATE_VM == 0xAE01
    assert uapi.KVM_CHECK_EXTENSION == 0xAE03
    assert uapi.KVM_RUN == 0xAE80


def test_copy_tags_byte_by_byte() -> None:
    argument = uapi.copy_mte_tags(0x1122, 0x3344, 0x5566, 1)
    assert argument == struct.pack("<6Q", 0x1122, 0x3344, 0x5566, 1, 0, 0)
    assert len(argument) == 48


def test_enable_cap_byte_by_byte() -> None:
    argument = uapi.enable_cap(uapi.KVM_CAP_ARM_MTE)
    assert argument == struct.pack("<II", 205, 0) + bytes(96)
    assert len(argument) == 104
