"""``compress recipes``: the shipped recipes and their keys."""

import click
from compress.cli.params import json_option, show


@click.group("recipes", invoke_without_command=True, short_help="List and explain recipes.")
@json_option
@click.pass_context
def recipes_command(ctx: click.Context, as_json: bool) -> None:
    """List the shipped recipes; `show NAME` prints one, `keys` explains every key."""
    if ctx.invoked_subcommand is not None:
        return
    from compress.recipe import Recipe

    shipped = Recipe.shipped()
    width = max(map(len, shipped))
    show([f"{name:<{width}}  {description}" for name, description in shipped.items()], shipped, as_json)


@recipes_command.command("show")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="With all keys, inherited ones and defaults too.")
@json_option
def show_command(name: str, resolved: bool, as_json: bool) -> None:
    """Print the recipe NAME (or a .yaml file) with its comments: a start for your own."""
    from compress.recipe import Recipe, recipe_source

    recipe = Recipe.load(name)
    text = recipe.to_yaml() if resolved else recipe_source(name)
    show([text.rstrip("\n")], recipe.model_dump(mode="json"), as_json)


@recipes_command.command("keys")
def keys_command() -> None:
    """Explain every key: meaning, allowed values, default."""
    from compress.keys import comment
    from compress.schema import SECTIONS

    for section, model in SECTIONS.items():
        for key in model.model_fields:
            click.secho(f"{section}.{key}", bold=True)
            click.echo(click.wrap_text(comment(section, key), initial_indent="    ", subsequent_indent="    "))
