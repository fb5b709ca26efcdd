"""What is in a GGUF model: its tensors with layer, role, experts and place, and the facts of its metadata.

`read_model_file` checks the file, and all parts of a split one, before llama.cpp sees it. Reads no weights.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from edgeinfer.errors import ModelFileError
from edgeinfer.gguf_header import (
    GGUFArray,
    GGUFHeader,
    Scalar,
    TensorRecord,
    read_header,
)

__all__ = ["GGUFArray", "ModelFile", "TensorInfo", "read_model_file"]

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp ends the process beyond it

_DAMAGED_OR_NEWER = "The file is damaged, or needs a newer edgeinfer and llama.cpp."
_ENCODER = "is an encoder: it makes embeddings and cannot generate text"
_ENCODER_DECODER = "is an encoder-decoder, which edgeinfer does not run"
_DIFFUSION = "is a diffusion language model, which does not generate token by token"
_COMPANION = "is a part that works only beside another model"
#: Architectures of llama.cpp whose models do not continue a text by themselves, and why.
_NOT_CAUSAL: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"), _ENCODER
    ),
    **dict.fromkeys(
        ("jina-bert-v2", "jina-bert-v3", "gemma-embedding", "llama-embed", "t5encoder"), _ENCODER
    ),
    "t5": _ENCODER_DECODER,
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION),
    **dict.fromkeys(("clip", "eagle3", "dflash", "gemma4-assistant", "wavtokenizer-dec"), _COMPANION),
}

_LAYER = re.compile(r"(.*?)blk\.([0-9]+)\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model.

    `type` is ggml's name ("Q4_0"); `shape` has ggml's order (ne[0], the row, first); `part` is an index into
    ModelFile.paths; `offset` is in bytes from the start of that part; `layer` is the N of "blk.N."; `role` is
    the name without "blk.N." and ".weight"; `num_experts` is 0 where the tensor does not hold experts.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    part: int
    offset: int
    nbytes: int
    layer: int | None
    role: str
    num_experts: int


@dataclass(frozen=True)
class ModelFile:
    """A model: the files that hold it, the metadata of the first, and all tensors in the files' order."""

    paths: tuple[Path, ...]
    part_bytes: tuple[int, ...]
    version: int
    metadata: dict[str, Scalar | GGUFArray]
    tensors: tuple[TensorInfo, ...]
    alignment: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def name(self) -> str:
        """The model's own name, or else the file's."""
        return self._text("general.name") or self.paths[0].stem

    @property
    def num_layers(self) -> int:
        """`<arch>.block_count`, or else one more than the last "blk.N."."""
        stated = self._count("block_count")
        if stated is not None:
            return stated
        return max((tensor.layer + 1 for tensor in self.tensors if tensor.layer is not None), default=0)

    @property
    def context_length(self) -> int | None:
        """Tokens of context that the model was trained for, where the file says it."""
        return self._count("context_length")

    @property
    def embedding_length(self) -> int | None:
        return self._count("embedding_length")

    @property
    def num_experts(self) -> int:
        """Experts in a layer; 0 for a dense model."""
        return self._count("expert_count") or 0

    @property
    def num_experts_used(self) -> int:
        """Experts that one token uses in a layer (the most, where layers differ); 0 for a dense model."""
        return self._count("expert_used_count") or 0

    @property
    def vocab_size(self) -> int | None:
        """Tokens in the vocabulary: of the tokenizer, or else as stated, or else rows of the embedding."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, GGUFArray):
            return tokens.length
        stated = self._count("vocab_size")
        embedding = self._by_name.get("token_embd.weight")
        return stated if stated or embedding is None or len(embedding.shape) < 2 else embedding.shape[1]

    @property
    def num_parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of all parts, headers and padding included."""
        return sum(self.part_bytes)

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def is_vocabulary_only(self) -> bool:
        return not self.tensors

    @property
    def is_causal(self) -> bool:
        """Whether the model continues a text by itself: no encoder, diffusion model or companion."""
        return self._why_not_causal is None

    def check_can_generate(self) -> None:
        """Raise ModelFileError if this is no model that generates text: a vocabulary only, an encoder..."""
        if self.is_vocabulary_only:
            raise ModelFileError(
                f"{self.paths[0]}: has a vocabulary only, no weights. Give a GGUF file of the whole model."
            )
        if self._why_not_causal:
            raise ModelFileError(
                f"{self.paths[0]}: architecture {self.architecture!r} {self._why_not_causal}. "
                "Give a causal language model, such as one of the llama, qwen3 or gemma3 architecture."
            )

    def tensor(self, name: str) -> TensorInfo:
        """The tensor of that name. Raises ModelFileError if there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelFileError(
                f"{self.paths[0]}: has no tensor {name!r} among its {len(self.tensors)}."
            ) from None

    @cached_property
    def _by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def _why_not_causal(self) -> str | None:
        if self.metadata.get(f"{self.architecture}.attention.causal") is False:
            return _NOT_CAUSAL.get(self.architecture, _ENCODER)
        return _NOT_CAUSAL.get(self.architecture)

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _count(self, suffix: str) -> int | None:
        """A count of the architecture: an integer, or the largest of an array with one for each layer."""
        key = f"{self.architecture}.{suffix}"
        value = self.metadata.get(key)
        if isinstance(value, GGUFArray) and value.values:
            value = max(value.values) if all(type(item) is int for item in value.values) else value
        if value is not None and (type(value) is not int or value < 0):
            raise ModelFileError(f"{self.paths[0]}: key {key!r} must be a count, found {str(value)[:60]!r}.")
        return value


def read_model_file(path: str | os.PathLike) -> ModelFile:
    """Read and check a GGUF model; for a split model, give the first part.

    Raises ModelFileError, which names the file, the place in it, what was expected and what to do.
    """
    first = read_header(path)
    headers = [first, *_other_parts(first)]
    tensors = tuple(
        _tensor_info(record, part) for part, header in enumerate(headers) for record in header.tensors
    )
    _check_unique(headers)
    _check_architecture(first)
    model = ModelFile(
        paths=tuple(header.path for header in headers),
        part_bytes=tuple(header.file_bytes for header in headers),
        version=first.version,
        metadata=first.metadata,
        tensors=tensors,
        alignment=first.alignment,
    )
    _check_layers(model)
    _check_epsilons(model)
    return model


def _tensor_info(record: TensorRecord, part: int) -> TensorInfo:
    match = _LAYER.fullmatch(record.name)
    layer = int(match[2]) if match else None
    role = (match[1] + match[3] if match else record.name).removesuffix(".weight")
    # MUL_MAT_ID reads expert e at data + e * nb[2]; grovemoe's second kind of experts is called "_chexps".
    num_experts = record.shape[2] if role.endswith("exps") and len(record.shape) == 3 else 0
    return TensorInfo(
        record.name, record.type, record.shape, part, record.offset, record.nbytes, layer, role, num_experts
    )


def _check_architecture(first: GGUFHeader) -> None:
    key = "general.architecture"
    if first.value_types.get(key) != "str" or not first.metadata[key]:
        found = first.value_types.get(key, "no such key")
        raise ModelFileError(
            f"{first.path}: key {key!r} must name the architecture, found {found}. Convert the model again."
        )


def _check_layers(model: ModelFile) -> None:
    """llama.cpp ends the process (GGML_ASSERT) on a block_count that is not in 1..512."""
    stated = model._count("block_count")
    if (
        stated is not None
        and model.tensors
        and model.architecture != "clip"
        and not 1 <= stated <= MAX_LAYERS
    ):
        raise ModelFileError(
            f"{model.paths[0]}: key {model.architecture + '.block_count'!r} is {stated}, "
            f"expected 1 to {MAX_LAYERS}. {_DAMAGED_OR_NEWER}"
        )
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer >= MAX_LAYERS:
            raise ModelFileError(
                f"{model.paths[tensor.part]}: tensor {tensor.name!r} is of layer {tensor.layer}, "
                f"expected 0 to {MAX_LAYERS - 1}. {_DAMAGED_OR_NEWER}"
            )


def _check_epsilons(model: ModelFile) -> None:
    """ggml ends the process (GGML_ASSERT) on a norm whose epsilon is negative or not a number."""
    for key, value in model.metadata.items():
        if key.endswith("_epsilon") and isinstance(value, float) and not value >= 0:
            raise ModelFileError(
                f"{model.paths[0]}: key {key!r} is {value}, expected 0 or more. {_DAMAGED_OR_NEWER}"
            )


def _other_parts(first: GGUFHeader) -> Iterable[GGUFHeader]:
    """The headers of parts 2 to N of a split model, checked against each other."""
    count = _split_value(first, "split.count", "u16", required=False) or 0
    if count <= 1:
        return []
    paths = _part_paths(first, count)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelFileError(
            f"{first.path}: {len(missing)} of the model's {count} parts are missing: {names}. "
            f"Put all parts into the folder of {first.path.name}."
        )
    others = [read_header(path) for path in paths[1:]]
    for index, header in enumerate(others, start=1):
        found = (
            _split_value(header, "split.no", "u16"),
            _split_value(header, "split.count", "u16", required=False),
        )
        if found[0] != index or found[1] not in (None, count):
            raise ModelFileError(
                f"{header.path}: says that it is split.no {found[0]} of split.count {found[1]}, "
                f"expected {index} of {count}. The parts are mixed up: download them again."
            )
    expected = _split_value(first, "split.tensors.count", "i32")
    total = sum(len(header.tensors) for header in (first, *others))
    if total != expected:
        raise ModelFileError(
            f"{first.path}: key 'split.tensors.count' is {expected}, but the {count} parts have {total} "
            "tensors. The parts do not belong together: download them again."
        )
    return others


def _split_value(header: GGUFHeader, key: str, expected: str, required: bool = True) -> int | None:
    """llama.cpp ends the process (GGML_ASSERT) on a part whose keys do not have the expected type."""
    found = header.value_types.get(key)
    if found == expected or found is None and not required:
        return header.metadata.get(key)
    raise ModelFileError(
        f"{header.path}: key {key!r} of a split model must be a {expected}, found {found or 'no such key'}. "
        "Split the model again with llama-gguf-split."
    )


def _part_paths(first: GGUFHeader, count: int) -> list[Path]:
    number = _split_value(first, "split.no", "u16")
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    name = first.path.name
    prefix = name.removesuffix(ending)
    if number != 0:
        renamed = not name.endswith(ending) or not prefix
        wanted = f"{'*' if renamed else prefix}-00001-of-{count:05d}.gguf"
        raise ModelFileError(
            f"{first.path}: is part {number + 1} of {count} of a model. Give its first part: {wanted}"
        )
    if not name.endswith(ending) or not prefix:
        raise ModelFileError(
            f"{first.path}: is part 1 of {count} of a model, so its name must end in {ending!r}. "
            "Give all parts their original names again."
        )
    return [first.path.with_name(f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf") for index in range(count)]


def _check_unique(headers: list[GGUFHeader]) -> None:
    """Within one part read_header has checked it."""
    owner: dict[str, Path] = {}
    for header in headers:
        for record in header.tensors:
            if record.name in owner:
                raise ModelFileError(
                    f"{header.path}: tensor {record.name!r} is also in {owner[record.name].name}. "
                    "The parts are mixed up: download them again."
                )
            owner[record.name] = header.path
