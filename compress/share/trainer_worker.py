"""A process of a distillation, started by torchrun: ``torchrun ... -m compress.share.trainer_worker FOLDER``.

Every process opens the model for itself. The first one tells what happens, on stdout.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from compress.calibrate.errors import InputError
from compress.events import Event, Message, StepDone
from compress.model import open_model
from compress.share.modules import share_layers
from compress.share.trainer import Task, train
from compress.share.trainer_launch import encoded, read_order


def work(folder: Path, events: bool) -> None:
    """Train, or go on with it.

    Args:
        folder: with an order.
        events: tell events as lines of JSON, for the process that launched this one; else in words.

    Raises:
        InputError: there is no order, the model can't be opened, or the batch can't be divided.
    """
    order = read_order(folder)
    device = PartialState(cpu=not torch.cuda.is_available()).device
    teacher = open_model(order.model).load_dense().to(device)
    student = copy.deepcopy(teacher)
    share_layers(student, order.shares)
    named = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in order.start.items():
            named[name].copy_(tensor)
    task = Task(student, teacher, order.shares, order.ids, order.seed)
    train(task, order.settings, folder, _tell_events if events else _tell_words)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _tell_events(event: Event) -> None:
    print(encoded(event), flush=True)


def _tell_words(event: Event) -> None:
    match event:
        case StepDone(index, total, seconds, told):
            print(f"{index + 1}/{total}  {told}  {seconds:.1f} s", flush=True)
        case Message(text):
            print(text, flush=True)


def main() -> int:
    """Exit status 2 where the user can mend what is wrong."""
    parser = argparse.ArgumentParser(prog="compress.share.trainer_worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", action="store_true", help="tell events as lines of JSON")
    arguments = parser.parse_args()
    try:
        work(arguments.folder, arguments.events)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
