"""Files of the Hub and official checkpoints, the cache, and model cards."""
