"""The parts of a form, checked when they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CHANNELS = ("rgb", "bgr", "gray")
FITS = ("stretch", "crop", "pad")
RESAMPLINGS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def _positive(name: str, value: object, least: float = 1) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value!r}")


@dataclass(frozen=True)
class PictureInput:
    """An input that takes a picture: values are (pixel * scale - mean) / std, pixels being 0 to 255.

    `fit`: how a picture gets the model's height and width: "stretch", "crop" (fill, cut the middle), "pad"
    (whole, in the middle, with `padding` pixels around). `multiple`, `longest`: for models of any size, sides
    are multiples of the one and at most the other.
    """

    channels: str = "rgb"
    fit: str = "stretch"
    resample: str = "bicubic"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    padding: int = 114
    multiple: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        _one_of("channels", self.channels, CHANNELS)
        _one_of("fit", self.fit, FITS)
        _one_of("resample", self.resample, RESAMPLINGS)
        _positive("multiple", self.multiple)
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) not in (1, 3):
                raise ValueError(f"expected 1 or 3 values of {name}, got {len(values)}")
            object.__setattr__(self, name, values)
        if not all(self.std):
            raise ValueError("expected values of std that are not 0")


@dataclass(frozen=True)
class BytesInput:
    """An input that takes the first and the last bytes of a file, each stripped of white space, as whole
    numbers.

    `block`: bytes looked at on each side; `padding`: the number that stands for no byte, behind the first
    ones and before the last ones.
    """

    first: int
    last: int
    block: int
    padding: int

    def __post_init__(self) -> None:
        for name in ("first", "last", "block", "padding"):
            _positive(name, getattr(self, name), 0)


@dataclass(frozen=True)
class ClassesResult:
    """An output with a number a class. `activation`: what makes probabilities of it; None: softmax unless
    they are."""

    output: str | None = None
    activation: str | None = None
    labels: str | None = None  # a file of this folder, or beside the model
    labels_key: str | None = None  # where the labels are in a JSON file

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, (None, "softmax", "sigmoid", "none"))


@dataclass(frozen=True)
class BoxesResult:
    """Outputs that are boxes with scores, one a row (or a cell of a grid).

    `boxes`, `scores`: names of outputs (`scores` None: the same output). `layout`: where the numbers of a box
    are: "rows" [.., N, numbers], "columns" [.., numbers, N], "grid" [.., numbers, H, W]. `place`: first of
    the four numbers. `form`: "corners" (x1, y1, x2, y2) or "centre" (x, y, width, height). `unit`: of the
    coordinates: "share" of the picture, "pixels" of the model's input, "cells": centre = (cell + tanh(t)) /
    cells, size = sigmoid(t). `objectness`: place of the number that says that there is something (None: there
    is none); `classes`: place of the first class; `background`: the class that means nothing. score =
    objectness ** objectness_power * class ** class_power. `activation`: "sigmoid" where scores are logits.
    """

    boxes: str
    scores: str | None = None
    layout: str = "rows"
    place: int = 0
    form: str = "corners"
    unit: str = "share"
    objectness: int | None = None
    classes: int = 0
    background: int | None = None
    objectness_power: float = 1.0
    class_power: float = 1.0
    activation: str = "none"
    threshold: float = 0.5
    overlap: float = 0.45
    labels: str | None = None

    def __post_init__(self) -> None:
        _one_of("layout", self.layout, ("rows", "columns", "grid"))
        _one_of("form", self.form, ("corners", "centre"))
        _one_of("unit", self.unit, ("share", "pixels", "cells"))
        _one_of("activation", self.activation, ("none", "sigmoid"))
        if self.unit == "cells" and (self.layout, self.form) != ("grid", "centre"):
            raise ValueError('expected layout "grid" and form "centre" with unit "cells"')


@dataclass(frozen=True)
class RegionsResult:
    """An output that is a map of probabilities, whose connected regions are found: text lines, for example.

    `grow`: how far a region's box is pushed outwards, times area / circumference (DBNet's unclip ratio);
    `score`: the least mean probability; `smallest`: the least side in pixels of the map.
    """

    output: str
    threshold: float = 0.3
    score: float = 0.6
    grow: float = 1.5
    smallest: int = 3
    label: str = "region"


@dataclass(frozen=True)
class GateRule:
    """When a model asks for the ones behind it: `output` reaches `above`, until it is under `below`."""

    output: str
    name: str
    above: float = 0.5
    below: float | None = None  # None: the same as `above`

    @property
    def release(self) -> float:
        return self.above if self.below is None else self.below


@dataclass(frozen=True)
class Framing:
    """How a sound goes through a model piece by piece.

    `input`: the input that takes it. "samples": [1, context + window], `context` samples from before the
    window, which moves by `hop`. "spectrum": the Fourier transform of a window under the square root of a
    Hann window, as `layout` says (the letters F: frequencies, T: 1, C: real and imaginary, B: 1); `output` is
    a spectrum of the same layout that becomes sound again. `rates`: what differs at other sample rates.
    """

    kind: str
    input: str
    rate: int
    window: int
    hop: int
    context: int = 0
    layout: str = "BFTC"
    output: str | None = None
    rate_input: str | None = None
    rates: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("samples", "spectrum"))
        for name in ("rate", "window", "hop"):
            _positive(name, getattr(self, name))
        if self.kind == "spectrum" and (self.window != 2 * self.hop or sorted(self.layout) != sorted("BFTC")):
            raise ValueError('expected a window of two hops and the letters of "BFTC" for a spectrum')
        if self.kind == "samples" and self.window != self.hop:
            raise ValueError(f"expected a hop of {self.window}, the window, for samples, got {self.hop}")

    def takes(self, rate: int | None) -> bool:
        """Whether the model takes sound of so many samples a second."""
        return rate == self.rate or str(rate) in self.rates


@dataclass(frozen=True)
class Form:
    """What is known about one family of models. `match`: {"inputs": {name: [type, shape]}, "outputs":
    ...}."""

    name: str
    about: str
    match: Mapping[str, Mapping[str, tuple[str, tuple[int | str | None, ...]]]]
    pictures: Mapping[str, PictureInput] = field(default_factory=dict)
    bytes: Mapping[str, BytesInput] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)  # of inputs that are left out
    state: Mapping[str, str] = field(default_factory=dict)  # input -> output
    framing: Framing | None = None
    gate: GateRule | None = None
    classes: ClassesResult | None = None
    boxes: BoxesResult | None = None
    regions: RegionsResult | None = None
