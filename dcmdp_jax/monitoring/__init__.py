"""What is measured, written and shown while a run trains."""
