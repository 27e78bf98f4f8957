"""The curvature of DuoAttention's loss at open gates: a score from a few backward passes instead of an optimisation.

Where all gates are 1 both streams are equal, so the gradient of the distillation is exactly 0 and says nothing. Its
second derivative by one gate, by Gauss and Newton, is up to a constant

    s_i = E over u of (d <u, H> / d alpha_i)^2,    u random signs on the judged hidden states H

and ranks heads by what closing each of them alone would cost, in second order.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.heads.data import Item
from compress.heads.duo import Settings, Streams
from compress.heads.layers import Layers

PROBES = 8  # draws of u for a prompt


def gauss_newton(model: PreTrainedModel, item: Item, settings: Settings, probes: int = PROBES) -> Tensor:
    """The score on one prompt.

    Args:
        model: frozen, left as it was.
        item: the prompt; what is judged is everything behind its context.
        settings: sink and recent tokens of a streaming head, the form of the mixed stream, the seed of the signs.
        probes: how many draws of signs.

    Returns:
        [layers, KV heads] float32, mean over probes, divided by the number of judged figures; 0 in layers with a
        sliding window of the model's own.
    """
    layers = Layers(model)
    generator = torch.Generator().manual_seed(settings.seed)
    with layers.tapped():
        streams = Streams(layers, settings)
        gates = torch.ones(layers.count, layers.kv_heads)
        run = streams.forward(item, gates)
        found = torch.zeros_like(gates)
        for _ in range(probes):
            with torch.enable_grad():
                last = run.mixed[-1].detach().requires_grad_()
                judged = layers.norm(last)[0, item.context :]
                signs = torch.randint(0, 2, judged.shape, generator=generator) * 2.0 - 1
                (upstream,) = torch.autograd.grad(judged, last, signs.to(judged.device))
            found += streams.backward(run, gates, upstream).square()
    return found / (probes * judged.numel())
