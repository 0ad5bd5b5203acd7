"""What measures: each file is a command that prints JSON."""
