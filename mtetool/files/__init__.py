"""Output files of any kind: new, whole or not at all, never onto their own input.

The package knows how a file is made and recognised, and nothing about tags.
"""
