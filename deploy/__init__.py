"""The `numoe` command and what ships to clusters."""
