"""What `infer` is made of besides the tracker: batches, shards, what is kept on disk."""
