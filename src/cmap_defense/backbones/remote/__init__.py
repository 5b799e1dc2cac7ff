"""Files from elsewhere: the Hub, official checkpoints, the cache; checking and publishing backbones."""
