"""What the five projects share: metrics, the run folder and its checkpoints, seeding."""
