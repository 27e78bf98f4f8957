"""Weight quantization: RSQ = rotation + token importance + GPTQ (arXiv 2503.01820)."""
