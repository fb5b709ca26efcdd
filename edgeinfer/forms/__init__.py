"""What is known about families of models: how they want pictures, sounds or bytes, and what their outputs
mean.

A family is one JSON file in this folder; adding one adds a file. `find_form` recognises a model by the names,
types and shapes of its inputs and outputs; `read_form` takes one by its name, or from a file of the user's
own.
"""

from edgeinfer.forms.form import (
    BoxesResult,
    BytesInput,
    ClassesResult,
    Form,
    Framing,
    GateRule,
    PictureInput,
    RegionsResult,
)
from edgeinfer.forms.reading import find_form, form_names, read_form

__all__ = [
    "BoxesResult",
    "BytesInput",
    "ClassesResult",
    "Form",
    "Framing",
    "GateRule",
    "PictureInput",
    "RegionsResult",
    "find_form",
    "form_names",
    "read_form",
]
