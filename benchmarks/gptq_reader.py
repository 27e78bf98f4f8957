"""A GPTQ folder in gptqmodel, the format's reference, through transformers: every weight against ours.

    pip install optimum gptqmodel    # in an environment of its own: it pins numpy
    python benchmarks/gptq_reader.py --model OUT/gptq

Exit code 1 if a weight isn't the same float16.
"""

import json
import sys
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

from compress.artifact.gptq import GptqCheckpoint


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(model: Path) -> None:
    block = json.loads((model / "config.json").read_text())["quantization_config"]
    # the kernel that dequantizes plainly; others repack words for a processor
    chosen = GPTQConfig(bits=block["bits"], backend="torch")
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float16, device_map={"": "cpu"}, quantization_config=chosen
    )
    ours, wrong, count = GptqCheckpoint(model), [], 0
    for name, module in theirs.named_modules():
        if hasattr(module, "qweight"):
            count += 1
            if not torch.equal(module.dequantize_weight().t(), ours.read(f"{name}.weight").half()):
                wrong.append(name)
    print(f"{count} modules, {block['checkpoint_format']}, {block['bits']} bits: {len(wrong)} differ {wrong[:3]}")
    sys.exit(bool(wrong) or not count)


if __name__ == "__main__":
    main()
