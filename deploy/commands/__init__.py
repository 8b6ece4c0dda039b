"""The sub-commands of `numoe`, one file each, as plain functions."""
