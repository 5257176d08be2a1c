"""The snapshot format, mtesnap(5): written front to back, read with every byte checked.

Of guests, this package knows only what they look like (`mtetool.guest`); files as such are the
business of `mtetool.files`.
"""
