"""Pages and tables made of run folders: no trainer, no torch, no GPU."""
