"""The command line, one file a command; commands only orchestrate."""
