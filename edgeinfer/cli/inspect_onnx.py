"""`edgeinfer inspect` on an ONNX file: inputs, outputs, operators and tensors, without reading its weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from edgeinfer.budget import format_size
from edgeinfer.errors import InputError
from edgeinfer.forms import Form, find_form
from edgeinfer.onnx.graph import OnnxFile
from edgeinfer.onnx.ports import Port, show_shape
from edgeinfer.streams.state import find_state

NUM_OPERATORS = 12


def describe_onnx(file: OnnxFile) -> dict[str, Any]:
    """The facts that `--json` prints; every value is plain JSON."""
    inputs, outputs = _ports(file.inputs), _ports(file.outputs)
    form = find_form(inputs, outputs)
    by_type: Counter[str] = Counter()
    for tensor in file.tensors:
        by_type[tensor.type] += tensor.nbytes
    return {
        "format": "ONNX",
        "ir_version": file.ir_version,
        "producer": file.producer,
        "opsets": {domain or "ai.onnx": version for domain, version in file.opsets.items()},
        "num_parameters": file.num_parameters,
        "file_bytes": file.file_bytes,
        "weights_bytes": file.weights_bytes,
        "external_bytes": sum(tensor.nbytes for tensor in file.tensors if tensor.path != file.path),
        "parts": [{"path": str(path), "bytes": path.stat().st_size} for path in file.paths],
        "inputs": [_port(port) for port in inputs],
        "outputs": [_port(port) for port in outputs],
        "form": form.name if form else None,
        "state": _state(inputs, outputs, form),
        "operators": {
            f"{domain}.{name}" if domain not in ("", "ai.onnx") else name: count
            for (domain, name), count in sorted(file.operators.items(), key=lambda item: -item[1])
        },
        "bytes_by_type": dict(by_type.most_common()),
        "tensors": [
            {"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape), "nbytes": tensor.nbytes}
            for tensor in file.tensors
        ],
        "metadata": dict(file.metadata),
    }


def _ports(found: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]) -> list[Port]:
    """Ports as the engine has them; a type without numbers of numpy's stands for itself."""
    return [Port(name, np.dtype(kind if _is_numpy(kind) else object), kind, shape) for name, kind, shape in found]


def _is_numpy(kind: str) -> bool:
    try:
        np.dtype(kind)
    except TypeError:
        return False
    return True


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "type": port.type_name, "shape": list(port.shape)}


def _state(inputs: list[Port], outputs: list[Port], form: Form | None) -> dict[str, str]:
    try:
        return find_state(inputs, outputs, form.state if form else {})
    except InputError:
        return {}


def table_onnx(facts: dict[str, Any]) -> str:
    """The facts for people. Text from the file is escaped: it may hold terminal commands."""
    from edgeinfer.cli.inspect import NUM_LARGEST, _count, _printable, _rows, _shares

    parts, opsets = facts["parts"], facts["opsets"]
    lines = _rows(
        ("file", _printable(parts[0]["path"])),
        ("size", f"{format_size(facts['file_bytes'])} in {len(parts)} file{'s' if len(parts) > 1 else ''}"),
        ("format", f"ONNX, IR {facts['ir_version']}, " + ", ".join(f"{k} {v}" for k, v in opsets.items())),
        ("producer", _printable(facts["producer"]) or "not stated"),
        ("parameters", _count(facts["num_parameters"])),
        ("external data", format_size(facts["external_bytes"]) if facts["external_bytes"] else "none"),
        ("form", facts["form"] or "none known"),
    )
    if len(parts) > 1:
        lines += ["", "files", *_rows(*((format_size(p["bytes"]), _printable(p["path"])) for p in parts))]
    for side in ("inputs", "outputs"):
        lines += ["", side]
        for port in facts[side]:
            kept = facts["state"].get(port["name"]) if side == "inputs" else None
            note = f"  state, from {kept}" if kept else ""
            lines.append(_printable(f"  {port['name']}: {port['type']} {show_shape(port['shape'])}{note}"))
    operators = facts["operators"]
    shown = [f"{name} {count}" for name, count in list(operators.items())[:NUM_OPERATORS]]
    more = len(operators) - len(shown)
    lines += ["", f"operators ({sum(operators.values()):,} of {len(operators)} kinds)"]
    lines.append(_printable("  " + ", ".join(shown) + (f", {more} more kinds" if more > 0 else "")))
    if not facts["tensors"]:
        return "\n".join([*lines, "", "This file has no weights."])
    lines += ["", "bytes by type", *_shares(facts["bytes_by_type"], max(1, facts["weights_bytes"]))]
    largest = sorted(facts["tensors"], key=lambda tensor: -tensor["nbytes"])[:NUM_LARGEST]
    lines += ["", f"largest of {len(facts['tensors'])} tensors"]
    for tensor in largest:
        shape = " x ".join(map(str, tensor["shape"]))
        name = _printable(tensor["name"]) or "(no name)"
        lines.append(f"  {format_size(tensor['nbytes']):>10}  {tensor['type']:<8}{name} ({shape})")
    return "\n".join(lines)
