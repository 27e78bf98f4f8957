"""Which KV heads need far tokens, found once for a model, and attention plans made of that."""
