"""What can be known to go wrong before a run starts."""
