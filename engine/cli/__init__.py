"""The command line: one module for each command, `options` and `terminal` for what they share."""
