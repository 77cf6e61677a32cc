"""The command line: `main` has the commands, `options` what they share."""
