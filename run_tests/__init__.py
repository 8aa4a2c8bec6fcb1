"""What a real run does: command line, run folders, checkpoints, telemetry, generation."""
