"""What rarefy keeps on disk: activation shards, checkpoints, saved methods, runs. FORMAT.md defines the layouts."""
