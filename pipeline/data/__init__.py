"""What a training is fed with: batches, their loaders and order, random numbers, pictures."""
