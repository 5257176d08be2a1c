"""The kernel's numbers, as measured on Linux 6.12 and as the C compiler lays them out."""

from __future__ import annotations

import struct

from mtetool import uapi


def test_request_numbers() -> None:
    assert uapi.KVM_ARM_MTE_COPY_TAGS == 0x8030AEB4
    assert uapi.KVM_ENABLE_CAP == 0x4068AEA3
    assert uapi.KVM_CREATE_VM == 0xAE01
    assert uapi.KVM_CHECK_EXTENSION == 0xAE03
    assert uapi.KVM_RUN == 0xAE80
    assert uapi.KVM_CREATE_VCPU == 0xAE41
    assert uapi.KVM_SET_USER_MEMORY_REGION == 0x4020AE46


def test_copy_tags_byte_by_byte() -> None:
    argument = uapi.copy_mte_tags(0x1122, 0x3344, 0x5566, 1)
    assert argument == struct.pack("<6Q", 0x1122, 0x3344, 0x5566, 1, 0, 0)
    assert len(argument) == 48
    assert uapi.copy_mte_tags(0, 0, 0, 0, reserved=7) == struct.pack("<6Q", 0, 0, 0, 0, 7, 7)


def test_enable_cap_byte_by_byte() -> None:
    argument = uapi.enable_cap(uapi.KVM_CAP_ARM_MTE)
    assert argument == struct.pack("<II", 205, 0) + bytes(96)
    assert len(argument) == 104


def test_memory_region_byte_by_byte() -> None:
    argument = uapi.memory_region(1, uapi.KVM_MEM_READONLY, 0x1122, 0x3344, 0x5566)
    assert argument == struct.pack("<II3Q", 1, 2, 0x1122, 0x3344, 0x5566)
    assert len(argument) == 32


def test_registers_by_their_ids() -> None:
    """As the kernel's list of registers has them (tools/testing/selftests/kvm/arm64)."""
    assert uapi.KVM_GET_ONE_REG == 0x4010AEAB
    assert uapi.KVM_REG_ARM_PSTATE == 0x6030_0000_0010_0042
    assert uapi.arm64_sys_reg(3, 0, 1, 0, 0) == 0x6030_0000_0013_C080  # SCTLR_EL1
    assert uapi.arm64_sys_reg(3, 0, 2, 0, 2) == 0x6030_0000_0013_C102  # TCR_EL1
