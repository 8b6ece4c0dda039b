"""Routed experts: the mailbox, a shard's side of it, and the attention worker's."""
