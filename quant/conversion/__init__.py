"""The conversion of a checkpoint, one decoder block at a time."""
