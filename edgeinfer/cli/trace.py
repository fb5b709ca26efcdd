"""`edgeinfer trace`: record which experts a mixture-of-experts model uses."""

from __future__ import annotations

from pathlib import Path

import click

from edgeinfer.cli.progress import ProgressLine


@click.command(
    epilog="""\b
    Examples:
      edgeinfer trace moe.gguf -p "Once upon a time" -o story.trace
      edgeinfer replay story.trace --memory 2GiB
    """
)
@click.argument("model")
@click.option("-p", "--prompt", required=True, help="The prompt.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the trace is written.")
@click.option("-n", "tokens", metavar="TOKENS", type=click.IntRange(min=1), default=128, show_default=True,
              help="Write at most this many tokens.")
@click.option("--memory", metavar="SIZE", help="Stay within 2GiB, 1500M, 50% ... Default: what is free now.")
@click.option("--temperature", metavar="T", type=click.FloatRange(min=0), default=0.8, show_default=True,
              help="0 always takes the most probable token.")
@click.option("--seed", metavar="S", type=click.IntRange(0, 2**32 - 2), help="Makes the same choices again.")
@click.option("--ctx", metavar="N", type=click.IntRange(1, 2**31 - 1), help="Tokens of context.")
@click.option("--threads", metavar="N", type=click.IntRange(1, 512), help="Computing threads.")
def trace(
    model: str,
    prompt: str,
    output: str,
    tokens: int,
    memory: str | None,
    temperature: float,
    seed: int | None,
    ctx: int | None,
    threads: int | None,
) -> None:
    """Let the mixture-of-experts model MODEL write, and record the experts that each layer chose for each token."""
    from edgeinfer.engines.opening import open_engine
    from edgeinfer.errors import TraceError
    from edgeinfer.model import Model

    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise TraceError(f"The trace {output} cannot be written: there is no folder {folder}.")
    with ProgressLine("Loading the model") as progress:
        engine = open_engine(
            model, memory=memory, context_length=ctx, threads=threads, progress=progress, record_routing=True
        )
    with Model(engine) as loaded, ProgressLine("Recording") as progress:
        for _ in loaded.generate(prompt, max_tokens=tokens, temperature=temperature, seed=seed):
            progress(min(1.0, loaded.engine.position / (loaded.engine.position + tokens)))
        recorded = loaded.engine.take_trace(loaded.stats.prompt_tokens)
    recorded.write(output)
    click.echo(
        f"{output}: {recorded.num_tokens} tokens, {recorded.num_layers} layers of {recorded.num_experts} experts, "
        f"{recorded.num_used} used."
    )
