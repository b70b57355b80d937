"""What is asked of several trainings at once (`sweep`), and of a target before any (`target`)."""
