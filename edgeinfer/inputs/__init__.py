"""What a model is given: arrays, pictures, sounds, bytes and text, from files or standard input."""

from edgeinfer.inputs.feeds import Fed, InputOptions, gather_feeds

__all__ = ["Fed", "InputOptions", "gather_feeds"]
