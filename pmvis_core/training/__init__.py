"""What every training run shares: the optimiser, the run folder, the loop, several processes."""
