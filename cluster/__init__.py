"""Where things run: topology, the placement plan, the supervisor."""
