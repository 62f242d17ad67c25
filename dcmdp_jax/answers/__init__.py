"""Compares mathematical answers: finds, reads and compares them at a bounded cost."""
