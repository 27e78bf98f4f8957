"""The packed KV cache: what a layer keeps of every token, and the stage that decides on it."""
