"""The snapshot format, mtesnap(5): written front to back, read with every byte checked.

Nothing of guests enters here but what they look like (`mtetool.guest`); files as such are in
`mtetool.files`.
"""
