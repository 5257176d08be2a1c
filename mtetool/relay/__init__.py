"""Between two QEMUs: what passes in a migration stream, for tags to go with it."""
