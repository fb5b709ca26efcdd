"""Copies of GGUF models that differ in what a test is about, written by the gguf package."""

import gguf
import numpy as np


def reordered(source, target, change, change_key=lambda _name, value: value):
    """The same model with its tensors in another order, or some of them replaced: `change` gets
    {name: (array, type)}; `change_key` gets the name of a key and its value. Alignment becomes 32.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.alignment"):
            value = change_key(name, field.contents())
            writer.add_key_value(name, value, field.types[0], *field.types[1:2])
    for name, (data, kind) in change({t.name: (t.data, t.tensor_type) for t in reader.tensors}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def changed(source, target, name, change):
    """The same model with one tensor changed by `change(float32 array)`, in its type and shape."""

    def replace(tensors):
        data, kind = tensors[name]
        values = change(gguf.dequantize(data, kind).copy())
        return {**tensors, name: (gguf.quantize(values.astype(np.float32), kind), kind)}

    return reordered(source, target, replace)
