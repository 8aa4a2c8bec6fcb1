"""What only a real run needs: data, checkpoints, telemetry, presets."""
