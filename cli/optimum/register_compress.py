"""``optimum-cli compress``: the same run for people who come from optimum.

Installed as a module of the namespace ``optimum.commands.register``, where optimum's command line looks for commands of
other packages; it imports ours only when the command runs.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Quantize a model by a recipe of compress."""

    COMMAND = CommandInfo(name="compress", help="Compress a language model by a recipe (RSQ, GPTQ, rounding).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options; everything else is a key of the recipe."""
        parser.description = "Everything else is a key of the recipe: see `compress recipes keys`."
        parser.add_argument("-m", "--model", required=True, help="Hub id, local folder, or .gguf file.")
        parser.add_argument("-o", "--output", required=True, help="Folder of the artifact.")
        parser.add_argument("-r", "--recipe", default="rsq", help="Shipped recipe or a .yaml file; default rsq.")
        parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="Recipe key.")
        parser.add_argument("--calibration", metavar="SRC", help="Calibration text (calibration.source).")

    def run(self) -> None:
        """Do what ``compress run`` does with the same options; exit code 2 for bad input."""
        from compress.calibrate.errors import InputError
        from compress.cli.console import Console

        from compress.optimum_quantizer import CompressQuantizer

        try:
            with Console() as console:
                result = CompressQuantizer.from_pretrained(self.args.model).quantize(
                    save_dir=self.args.output,
                    recipe=self.args.recipe,
                    set=tuple(self.args.set),
                    calibration=self.args.calibration,
                    on_event=console.on_event,
                )
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        print("\n".join(result.summary))


REGISTER_COMMANDS = [CompressCommand]
