"""The lab: an emulated arm64 KVM host with MTE, booted for a command or for a session of tests."""
