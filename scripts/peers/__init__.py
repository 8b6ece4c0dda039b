"""What `scripts/bench-peers` runs, each module in the environment of its program: python -m peers.NAME JOB."""
