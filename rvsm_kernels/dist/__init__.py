"""Parameters that lie on several ranks: a step works on each rank's shard."""
