"""What several test files share: inputs, references, small models and runs."""
