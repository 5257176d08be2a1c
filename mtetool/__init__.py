"""Save, restore and look at the memory tags (Arm MTE) of live KVM guests."""

__version__ = "0.1.0"
