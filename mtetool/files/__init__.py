"""Output files of any kind: new, whole or not at all, never onto their own input.

It knows how a file is made and what a file is taken for, and nothing of tags.
"""
