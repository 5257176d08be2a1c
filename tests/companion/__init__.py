"""The companion service, without a kernel that has KVM."""
