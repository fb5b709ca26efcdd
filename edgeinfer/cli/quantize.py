"""`edgeinfer quantize`: make a GGUF model smaller, and say what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgeinfer.budget import parse_size
from edgeinfer.cli.quantize_job import AUTO, Job, run_job
from edgeinfer.cli.quantize_report import table
from edgeinfer.cli.termination import termination_interrupts
from edgeinfer.errors import ExportError

BUNDLED = "bundled page"


@click.command(
    epilog="""\b
    Examples:
      edgeinfer quantize model-f16.gguf -o model-q4.gguf --quant Q4_K_M
      edgeinfer quantize model-f16.gguf -o model-iq3.gguf --quant IQ3_XXS --calibration text.txt
      edgeinfer quantize model-f16.gguf -o small.gguf --quant auto --size 2GiB --calibration text.txt
      edgeinfer quantize model-f16.gguf -o small.gguf --quant auto --size 30% --calibration text.txt \\
          --check held-out.txt --picture sizes.svg
    """
)
@click.argument("model", type=click.Path())
@click.option(
    "-o", "--output", "target", metavar="FILE", required=True, help="Write the quantized model here."
)
@click.option("--quant", "type_", metavar="TYPE", required=True, help="Q4_K_M, IQ3_S, Q8_0 ..., or auto.")
@click.option("--size", metavar="SIZE", help="With auto, the file's size: 2GiB, or 30% of the source.")
@click.option("--calibration", metavar="FILE", help="Gather an importance matrix from this text.")
@click.option(
    "--importance", metavar="FILE.gguf", help="Read the importance matrix; with --calibration, keep it there."
)
@click.option(
    "--check",
    metavar="[FILE]",
    is_flag=False,
    flag_value=BUNDLED,
    help="Measure perplexity before and after, on this text or on a bundled page.",
)
@click.option("--picture", metavar="FILE.svg", help="With --check, draw perplexity over size for many types.")
@click.option("--requantize", is_flag=True, help="Also where the model is quantized already.")
@click.option("--memory", metavar="SIZE", help="Compute within 2GiB, 50% ... Default: what is free now.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all numbers.")
@termination_interrupts()
def quantize(as_json: bool, **options: Any) -> None:
    """Write the GGUF file MODEL in fewer bits a weight.

    TYPE is one of llama.cpp's, or auto: then the bits of each tensor are chosen so that the file has --size
    and loses least on the calibration text, which takes a while. An importance matrix lets quantization round
    where it matters least; types below 3 bits need one. The calibration text should be like what the model
    will read, some 20,000 tokens; that of --check another one.
    """
    facts = run_job(_job(**options))
    click.echo(json.dumps(facts) if as_json else table(facts))


def _job(
    model: str,
    target: str,
    type_: str,
    size: str | None,
    calibration: str | None,
    importance: str | None,
    check: str | None,
    picture: str | None,
    requantize: bool,
    memory: str | None,
    force: bool,
) -> Job:
    """Everything that can be refused before work starts."""
    from edgeinfer.exporters.auto_bits import target_bytes
    from edgeinfer.exporters.quant_types import find_type
    from edgeinfer.exporters.windows import read_text
    from edgeinfer.modelfile import read_model_file

    is_auto = type_.lower() == AUTO
    type_ = AUTO if is_auto else find_type(type_)
    if is_auto and (size is None or calibration is None):
        raise ExportError(
            "--quant auto chooses on a text and for a size: give --calibration FILE and --size 2GiB."
        )
    if size is not None and not is_auto:
        raise ExportError(
            f"--size is for --quant auto; the size of {type_} is what it is. Leave one of them out."
        )
    if picture is not None and check is None:
        raise ExportError("--picture draws perplexity on the text of --check. Give that too.")
    if picture is not None and Path(picture).suffix.lower() != ".svg":
        raise ExportError(f"Pictures are SVG files: expected a name that ends in .svg, found {picture!r}.")
    if Path(model).resolve() == Path(target).resolve():
        raise ExportError(f"{target} is the model itself. Give another -o.")
    text = None
    if check is not None:
        text = read_text(bundled_page() if check == BUNDLED else check)
    return Job(
        source=Path(model),
        target=Path(target),
        type=type_,
        num_bytes=target_bytes(size, read_model_file(model)) if is_auto else None,
        calibration=Path(calibration) if calibration else None,
        importance=Path(importance) if importance else None,
        check=text,
        picture=Path(picture) if picture else None,
        memory=parse_size(memory) if memory else None,
        requantize=requantize,
        force=force,
    )


def bundled_page() -> Path:
    import edgeinfer.exporters

    return Path(edgeinfer.exporters.__file__).parent / "texts" / "page.txt"
