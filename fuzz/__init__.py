"""Fuzzing of everything that reads bytes which nobody has vouched for; README.md says how to run it."""
