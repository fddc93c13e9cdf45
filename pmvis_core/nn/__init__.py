"""Parts that networks are built from; they know tensors and plain numbers, never a config."""
