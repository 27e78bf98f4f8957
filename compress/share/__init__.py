"""Layers that share attention, or keys and values (EchoAtt, arXiv 2409.14595; KVSharer, arXiv 2410.18517)."""
