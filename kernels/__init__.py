"""One folder an operation: a readable reference that defines the meaning, and faster paths beside it."""
