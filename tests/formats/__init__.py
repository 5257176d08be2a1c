"""Tags in the forms of other programs, and those programs."""
