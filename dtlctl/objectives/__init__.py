"""What disposal minimises: collision, the other unlearning losses, retaining losses. They know models and batches."""
