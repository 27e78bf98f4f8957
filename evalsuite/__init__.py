"""What was lost and what was gained: perplexity, lm-eval, comparisons. Loaded models come in as arguments."""
