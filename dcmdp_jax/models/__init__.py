"""Qwen3 decoders, dense and Mixture-of-Experts: pure functions over plain parameter trees."""
