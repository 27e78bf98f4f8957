"""``compress doctor``: what this machine offers, and whether the kernels compile."""

import os

import click
from compress.cli.params import json_option, show


@click.command("doctor", short_help="Show what this machine offers.")
@click.option("--kernels", is_flag=True, help="Compile every Triton kernel for every GPU; none is needed.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Compile so many at once; default: cores."
)
@json_option
@click.pass_context
def doctor_command(ctx: click.Context, kernels: bool, jobs: int, as_json: bool) -> None:
    """Show what this machine offers: versions, processor, GPU, compiled kernels, and whether the Hub answers.

    With --kernels, compile the Triton kernels for sm_80, sm_90 and gfx942 instead, and print what each takes: registers
    and bytes of stack a thread, bytes of shared memory, tensor-core and integer-to-float instructions. Exit code 1 if
    one is outside its limits.
    """
    from compress.doctor import check_kernels, examine, kernel_lines

    if not kernels:
        diagnosis = examine()
        show(diagnosis.lines(), diagnosis.to_json(), as_json)
        return
    rows = check_kernels(jobs)
    show(kernel_lines(rows), {"kernels": [row.to_json() for row in rows]}, as_json)
    if any(row.problems for row in rows):
        ctx.exit(1)
