"""The inference path: pure decoding functions, the slot loop, and the JetStream engine around them."""
