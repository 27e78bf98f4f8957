"""Attention calibration (ACT, arXiv 2406.15765): weaker attention sinks, in heads that gain by it.

A head's sinks are tokens behind the first that get far more attention than others (``sinks.py``). Its attention is the
merge of two segments, sinks and all other tokens, and calibration gives the sinks ``beta`` times the weight that they
have (``segments.py``); no probabilities are held. A part of the cache does it at run time (``part.py``). Which heads
gain is said by the gradient of the loss by ``beta`` (``gradient.py``), over questions with an answer
(``questions.py``).
"""
